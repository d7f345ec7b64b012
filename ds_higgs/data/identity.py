"""What a prepared set depends on, as two hashes: of the manifest's content, and of everything else."""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ds_higgs.data.rules import SampleRules
from ds_higgs.errors import UserError
from ds_higgs.files import hash_file

ANALYSIS_VERSION = 1  # raise it when the same entry and rules would give another sample than before


@dataclass(frozen=True)
class Identity:
    """manifest: of its content; rules: of what its samples are checked against and tokenized with."""

    manifest: str
    rules: str

    @property
    def name(self) -> str:
        """Of folders with it."""
        return f"{self.manifest[:12]}{self.rules[:12]}"


def identify(manifest: Path, rules: SampleRules) -> Identity:
    """The identity of a manifest's prepared set; where its audio lies is no part of it.

    Raises:
        UserError: the manifest cannot be read.
    """
    content = hash_manifest(manifest)
    described: dict[str, Any] = {
        "version": ANALYSIS_VERSION,
        "boson": version("boson-multimodal"),
        "tokenizer": _tokenizer_hash(rules.tokenizer),
        "codec": rules.codec.identity,
        "layout": {**asdict(rules.layout), "whisper_folder": None},
        "limits": asdict(rules.limits),
        "max_tokens": rules.max_tokens,
        "reference_turn": rules.reference_turn,
        "prompt_form": rules.prompt_form,
        "exclude": sorted(name for name in rules.exclude if name.rpartition(":")[0] == manifest.name),
    }
    return Identity(content, _hash(json.dumps(described, sort_keys=True)))


def hash_manifest(manifest: Path) -> str:
    """Of its bytes.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return hash_file(manifest)
    except OSError as error:
        raise UserError(f"{manifest}: cannot read the manifest: {error.strerror or error}") from None


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides which tokens a text gives."""
    if not tokenizer.is_fast:
        return _hash(json.dumps([sorted(tokenizer.get_vocab().items()), type(tokenizer).__name__]))
    content = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    # What the last call happened to ask for is no part of the tokenizer.
    return _hash(json.dumps({key: content[key] for key in content if key not in ("padding", "truncation")}))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""A model that can speak: base checkpoint, adapter, tokenizer and codec, loaded for inference."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ds_higgs.adapters.merging import load_adapter
from ds_higgs.data.audio import Segment, decode
from ds_higgs.data.build import build_dataset
from ds_higgs.data.cache import default_code_cache
from ds_higgs.data.codec.opening import find_codec
from ds_higgs.data.codec.source import AudioCodec
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.rules import ReferenceTurn, SampleRules, build_rules
from ds_higgs.errors import UserError
from ds_higgs.model.loading import HiggsAudioModel, load_model, load_tokenizer, read_model_config
from ds_higgs.model.lora import unwrap


@dataclass(frozen=True)
class Voice:
    """Everything that speaking takes. model: in evaluation mode, with the adapter's layers in place."""

    model: HiggsAudioModel
    rules: SampleRules
    codec: AudioCodec
    collator: BatchCollator

    @classmethod
    def load(
        cls,
        base: Path,
        adapter: Path | None,
        *,
        codec: str | None = None,
        audio_root: Path | None = None,
        reference_turn: ReferenceTurn = "as_is",
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Voice":
        """Load a base checkpoint with an adapter on it (None: without).

        Args:
            codec: folder or hub id; None: the base's own, else the released audio tokenizer.
            audio_root, reference_turn: of manifests that will be read, as in training.
            device, dtype: None: the GPU in bf16 where there is one, else the CPU in fp32.

        Raises:
            UserError: for what is missing or does not fit.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        rules = build_rules(
            tokenizer=load_tokenizer(base),
            model_config=read_model_config(base),
            codec=find_codec(codec, base),
            audio_root=audio_root,
            reference_turn=reference_turn,
        )
        if rules.layout.whisper:
            raise UserError(f"{base}: speaking with a base checkpoint that has a Whisper tower is not supported")
        model = load_model(base, dtype=dtype)
        if adapter is not None:
            model = unwrap(load_adapter(model, adapter))
        return cls(
            model=model.eval().to(device),
            rules=rules,
            codec=rules.codec.load(device),
            collator=BatchCollator(rules.layout),
        )

    def encode(self, file: Path) -> torch.Tensor:
        """The codes of an audio file: [codebooks, frames].

        Raises:
            UserError: if the file cannot be used.
        """
        try:
            waveform = decode(file, Segment(), sampling_rate=self.codec.sampling_rate)
        except (BadSampleError, OSError) as error:
            raise UserError(f"{file}: {error}") from error
        return self.codec.encode([waveform])[0]

    def read_manifest(self, manifest: Path, *, cache_dir: Path | None = None) -> HiggsDataset:
        """The samples of a manifest, their audio encoded where the code cache lacks it."""
        device = str(self.model.device)
        return build_dataset(manifest, rules=self.rules, cache_dir=cache_dir or default_code_cache(), device=device)

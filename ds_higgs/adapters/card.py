"""The README.md of an exported adapter or model: what it is, what it was trained on, how to use it.

Names and texts come from folders and files: none of them may end a code block, become code, or become HTML.
"""

import re
import shlex
from collections.abc import Sequence
from typing import Literal

import yaml

from ds_higgs import __version__
from ds_higgs.adapters.publishing import BUILT_WITH, LICENCE_LINK, LICENCE_NAME
from ds_higgs.adapters.record import AdapterRecord
from ds_higgs.model.trained import TrainMode

# The licence of the released base checkpoint, which what is trained from it inherits.
BASE_LICENCE = "other"
_MERGED_KINDS: dict[TrainMode, str] = {
    "lora": "The base model with a LoRA adapter merged into its weights",
    "audio_path": "A model with a fine-tuned audio path",
    "full": "A fine-tuned model",
}
_SPEAK = """\
text = {"type": "text", "text": "Good morning."}
conversation = [{"role": "user", "content": [text]}]
inputs = processor.apply_chat_template(
    conversation, add_generation_prompt=True, tokenize=True, return_dict=True, sampling_rate=24000, return_tensors="pt"
)
codes = model.generate(**inputs, max_new_tokens=750)
processor.save_audio(processor.batch_decode(codes), "speech.wav")"""
_MARKDOWN = re.compile(r"([\\`*_\[\]<>#|~&])")


def write_card(
    *,
    title: str,
    base: str,
    revision: str | None,
    licence: str,
    command: str,
    usage: str,
    merged: bool,
    facts: list[str],
    config: str,
    mode: TrainMode = "lora",
    samples: Sequence[str] = (),
) -> str:
    """The card's text.

    Args:
        licence: BASE_LICENCE, or another one's name on the hub.
        command: a shell's, that speaks to a WAV file; empty: there is none.
        samples: names of audio files beside the card.
        facts: lines of "What it was trained on"; empty: not known.
        usage: Python code.
        config: the run's YAML; empty: not known.
        mode: how it was trained; but for lora, it is `merged`.
    """
    header = {
        "base_model": base,
        "base_model_relation": "finetune" if merged else "adapter",
        "library_name": "transformers" if merged else "peft",
        **_licence_of(licence),
        "pipeline_tag": "text-to-speech",
        "tags": ["higgs-audio", "text-to-speech", "voice-cloning"] + ([] if merged else ["lora"]),
    }
    kind = _MERGED_KINDS[mode] if merged else "A LoRA adapter"
    origin = code_span(base) + (f" at revision {code_span(revision)}" if revision else "")
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {plain(title)}",
        f"{kind} for Higgs Audio v2, made from {origin} with ds_higgs {__version__}.",
        "## Use",
        *([code_block(command, "bash")] if command else []),
        code_block(usage, "python"),
    ]
    if samples:
        parts += ["## Listen", *(f'<audio controls src="{name}"></audio>' for name in samples)]
    if facts:
        parts += ["## Training", "\n".join(f"- {fact}" for fact in facts)]
    if config:
        parts += ["<details><summary>Configuration</summary>", code_block(config, "yaml"), "</details>"]
    if licence == BASE_LICENCE:
        parts += ["## Licence", f"{BUILT_WITH}. See the licences and NOTICE in this folder, and the base's own page."]
    return "\n\n".join(parts) + "\n"


def write_command(*, title: str, base: str, revision: str | None, merged: bool) -> str:
    """A command of this package that speaks with the export `title`, a folder, to speech.wav."""
    model = ["--base", title] if merged else ["--base", base, "--adapter", title]
    model += ["--revision", revision] if revision and not merged else []
    return shlex.join(["ds-higgs", "generate", *model, "--text", "Good morning.", "-o", "speech.wav"])


def _licence_of(licence: str) -> dict[str, str]:
    if licence != BASE_LICENCE:
        return {"license": licence}
    return {"license": licence, "license_name": LICENCE_NAME, "license_link": LICENCE_LINK}


def write_usage(
    *, title: str, base: str, revision: str | None, merged: bool, layout: Literal["original", "transformers"]
) -> str:
    """Python code that loads the export `title`; names from outside stand in it as string literals alone."""
    whole = repr(title) if merged else repr(base) + (f", revision={revision!r}" if revision else "")
    if layout == "transformers":
        model_class = "HiggsAudioV2ForConditionalGeneration"
        imports = [f"from transformers import AutoProcessor, {model_class}"]
        needs = ['# pip install "transformers>=5.3" torchaudio soundfile' + ("" if merged else " peft")]
        speak = [f"processor = AutoProcessor.from_pretrained({whole})", _SPEAK]
    else:
        model_class = "HiggsAudioModel"
        imports = [f"from boson_multimodal.model.higgs_audio import {model_class}"]
        needs, speak = [], []
    load = [f"model = {model_class}.from_pretrained({whole})"]
    if not merged:
        imports = ["import torch.distributed.tensor  # before PEFT", "from peft import PeftModel", *imports]
        load.append(f"model = PeftModel.from_pretrained(model, {title!r})")
    return "\n".join([*needs, *imports, *load, *speak])


def describe(record: AdapterRecord, *, num_codebooks: int, frames_per_second: float) -> list[str]:
    """What made an adapter, as lines of text."""
    facts = [
        f"{record.step:,} optimizer steps over {record.samples:,} samples (every pass counted), seed {record.seed}"
    ]
    if record.audio_targets is not None:
        hours = record.audio_targets / num_codebooks / frames_per_second / 3600
        facts.append(f"{hours:.2f} hours of target speech (every pass counted)")
    lora = record.config.get("lora", {})
    if record.config.get("train", {}).get("mode", "lora") == "lora" and (whole := lora.get("modules_to_save")):
        facts.append(f"trained whole beside LoRA: {plain(whole if isinstance(whole, str) else ', '.join(whole))}")
    losses = ", ".join(f"{name} {value:.4f}" for name, value in record.losses.items())
    facts.append(f"last {record.losses_are_of} losses: {losses}" if losses else "no loss was recorded")
    return facts


def plain(text: str) -> str:
    """`text` on one line of Markdown, nothing in it read as Markdown or HTML."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def code_span(text: str) -> str:
    """`text` as inline code, on one line."""
    text = " ".join(text.split())
    fence = "`" * (1 + _longest_run_of_backticks(text))
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def code_block(text: str, language: str) -> str:
    """`text` as a block of code, which nothing in it can end."""
    fence = "`" * max(3, 1 + _longest_run_of_backticks(text))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _longest_run_of_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)

"""The README.md of an exported adapter or model: what it is, what it was trained on, how to use it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from ds_higgs import __version__
from ds_higgs.run_folder import RunFolder

# The licence of the released base checkpoint, which what is trained from it inherits.
BASE_LICENCE = "other"


@dataclass(frozen=True)
class TrainingFacts:
    """What a run did up to the exported step.

    losses: of the last validation up to then (training, where there was none).
    """

    steps: int
    samples: int
    audio_targets: int
    losses: Mapping[str, float]
    losses_are_of: str
    config: Mapping[str, Any]

    @classmethod
    def read(cls, run: RunFolder, step: int | None) -> "TrainingFacts":
        """The facts of `run` at `step` (None: its last)."""
        last = run.last_step if step is None else step
        steps = [line for line in run.events("step") if line["step"] <= last]
        evals = [line for line in run.events("eval") if line["step"] <= last]
        newest = (evals or steps or [{}])[-1]
        return cls(
            steps=last,
            samples=sum(line["num_samples"] for line in steps),
            audio_targets=sum(line["num_audio_targets"] for line in steps),
            losses={name: newest[name] for name in ("loss", "text_loss", "audio_loss") if name in newest},
            losses_are_of="validation" if evals else "training",
            config=run.config,
        )

    def speech_hours(self, *, num_codebooks: int, frames_per_second: float) -> float:
        """Hours of speech trained on, every pass counted."""
        return self.audio_targets / num_codebooks / frames_per_second / 3600


def write_card(
    *,
    title: str,
    base: str,
    revision: str | None,
    licence: str,
    usage: str,
    merged: bool,
    facts: list[str],
    config: str,
) -> str:
    """The card's text.

    Args:
        facts: lines of "What it was trained on"; empty: not known.
        usage: Python code.
        config: the run's YAML; empty: not known.
    """
    header = {
        "base_model": base,
        "base_model_relation": "finetune" if merged else "adapter",
        "library_name": "transformers" if merged else "peft",
        "license": licence,
        "pipeline_tag": "text-to-speech",
        "tags": ["higgs-audio", "text-to-speech", "voice-cloning"] + ([] if merged else ["lora"]),
    }
    kind = "The base model with a LoRA adapter merged into its weights" if merged else "A LoRA adapter"
    origin = f"`{base}`" + (f" at revision `{revision}`" if revision else "")
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        f"{kind} for Higgs Audio v2, made from {origin} with ds_higgs {__version__}.",
        "## Use",
        f"```python\n{usage.strip()}\n```",
    ]
    if facts:
        parts += ["## Training", "\n".join(f"- {fact}" for fact in facts)]
    if config:
        parts += ["<details><summary>Configuration</summary>", f"```yaml\n{config.strip()}\n```", "</details>"]
    return "\n\n".join(parts) + "\n"


def describe(facts: TrainingFacts, *, num_codebooks: int, frames_per_second: float) -> list[str]:
    """The facts as lines of text."""
    hours = facts.speech_hours(num_codebooks=num_codebooks, frames_per_second=frames_per_second)
    losses = ", ".join(f"{name} {value:.4f}" for name, value in facts.losses.items())
    return [
        f"{facts.steps:,} optimizer steps over {facts.samples:,} samples (every pass counted)",
        f"{hours:.2f} hours of target speech (every pass counted)",
        f"last {facts.losses_are_of} losses: {losses}" if losses else "no loss was recorded",
    ]

"""What mistakes and settings of a training do to what is heard, on the small base that speaks.

    python benchmarks/small_base.py mistakes --work /tmp/small_base     # needs espeak-ng; half an hour of two cores
    python benchmarks/small_base.py adapters --work /tmp/small_base     # three seeds of each setting

mistakes: the small base forgets its audio embeddings and its audio head (random again) and learns them anew on 2,000
    utterances, with a mistake of public trainers planted each time and once with none; then it speaks the 40 judged
    sentences.
adapters: settings of the quickstart's training (40 recordings of a new voice), 20 sentences spoken by each adapter.

Judged as examples/small_base/judge.py does. Every training is a process of its own; what is there already is kept.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import describe_run, print_table, write_json
from safetensors.torch import load_file, save_file

from ds_higgs.batch import IGNORE_INDEX, Batch

EXAMPLE = Path("examples/small_base")
RESULTS = Path("benchmarks/results")
NUM_UTTERANCES, STEPS = 2000, 400
FORGOTTEN = ("audio_codebook_embeddings", "audio_lm_head")

Labels = tuple[torch.Tensor, torch.Tensor]  # text, audio: as ds_higgs.batch.Labels lays them out


def not_shifted(batch: Batch, stream_eos: int) -> Labels:
    """Every position learns its own token, which it is given."""
    text, audio = (
        torch.cat([torch.full_like(labels[:, :1], IGNORE_INDEX), labels[:, :-1]], dim=1)
        for labels in (batch.labels.text, batch.labels.audio)
    )
    return text, audio


def reference_trained(batch: Batch, stream_eos: int) -> Labels:
    """The reference's codes are learned as the target's are."""
    codes = batch.model_inputs["audio_out_ids"]
    audio = torch.where(batch.labels.audio == IGNORE_INDEX, codes, batch.labels.audio)
    audio[:, batch.model_inputs["audio_out_ids_start"]] = IGNORE_INDEX
    return batch.labels.text, audio


def eos_untrained(batch: Batch, stream_eos: int) -> Labels:
    """The end of speech is no target."""
    audio = batch.labels.audio
    return batch.labels.text, torch.where(audio == stream_eos, IGNORE_INDEX, audio)


def over_masked(batch: Batch, stream_eos: int) -> Labels:
    """No code is a target: the audio loss is nothing."""
    return batch.labels.text, torch.full_like(batch.labels.audio, IGNORE_INDEX)


PLANTED: dict[str, Callable[[Batch, int], Labels]] = {
    "no shift": not_shifted,
    "reference trained": reference_trained,
    "EOS untrained": eos_untrained,
    "over-masked audio": over_masked,
}
MISTAKES: dict[str, dict[str, Any]] = {
    "none": {},
    **{name: {} for name in PLANTED},
    "no delay pattern": {"data.use_delay_pattern": "false"},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "as the quickstart": {},
    "codebooks falling": {"loss.codebook_weights": "falling"},
    "codebooks first": {"loss.codebook_weights": "first"},
    "text weight 0.1": {"loss.text_weight": 0.1},
    "rank 4": {"lora.rank": 4, "lora.alpha": 8},
    "rank 64": {"lora.rank": 64, "lora.alpha": 128},
    "learning rate 2.5e-4": {"optim.learning_rate": 2.5e-4},
    "learning rate 1e-3": {"optim.learning_rate": 1e-3},
    "always a reference": {"data.drop_reference": 0.0},
    "never a reference": {"data.drop_reference": 1.0},
    "one reference": {"data.reference": "as_is"},
    "LoRA alone": {"lora.modules_to_save": "[]"},
}


def plant(mistake: str) -> None:
    """From here on, every collated batch of this process has the labels that `mistake` gives it."""
    from ds_higgs.data.collation import BatchCollator

    collate = BatchCollator.__call__

    def collate_wrongly(self, samples, sample_ids):
        batch = collate(self, samples, sample_ids)
        text, audio = PLANTED[mistake](batch, self.layout.stream_eos)
        return replace(batch, labels=replace(batch.labels, text=text, audio=audio))

    BatchCollator.__call__ = collate_wrongly  # type: ignore[method-assign]


def train(config: Path, run: Path, settings: dict[str, Any], *, mistake: str = "none") -> None:
    """Train as `ds-higgs train` does, unless the run has ended before."""
    if (run / "adapters" / "final").is_dir():
        return
    values = {"run.output_dir": run, **settings}
    keys = [text for key, value in values.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, __file__, "--mistake", mistake, "train", "-c", str(config), *keys]
    subprocess.run(command, check=True)


def judge(name: str, work: Path, *arguments: str | Path) -> dict[str, dict[str, int]]:
    """The scores of examples/small_base/judge.py, each as good and of."""
    scores = work / "scores" / f"{name}.json"
    if not scores.is_file():
        scores.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, EXAMPLE / "judge.py", *arguments, "--json", scores]
        subprocess.run(list(map(str, command)), check=True)
    return json.loads(scores.read_text(encoding="utf-8"))


def write_forgotten_base(folder: Path, *, seed: int) -> None:
    """The small base with random audio embeddings and a random audio head."""
    shutil.copytree(EXAMPLE / "base", folder, dirs_exist_ok=True)
    file = folder / "model.safetensors"
    weights, random = load_file(file), torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        if any(part in name for part in FORGOTTEN):
            weights[name] = (0.02 * torch.randn(weight.shape, generator=random)).to(weight.dtype)
    save_file(weights, file, metadata={"format": "pt"})


def study_mistakes(work: Path, seeds: list[int], chosen: list[str]) -> Iterator[dict[str, Any]]:
    speech = work / "speech"
    if not (speech / "val.json").is_file():
        counts = ["--count", str(NUM_UTTERANCES), "--codec-count", "1", "--varied-count", "0", "--voices", "0"]
        subprocess.run([sys.executable, EXAMPLE / "make_speech.py", "--out", speech, *counts], check=True)
    for seed in seeds:
        base = work / f"forgotten{seed}"
        write_forgotten_base(base, seed=seed)
        for mistake in chosen or MISTAKES:
            settings = MISTAKES[mistake]
            name = f"{mistake} {seed}".replace(" ", "_")
            common = {
                "model.base": base,
                "data.train_manifest": speech / "train.json",
                "data.val_manifest": speech / "val.json",
                "data.cache_dir": work / "codes",
                "run.seed": seed,
                "run.max_steps": STEPS,
                "run.epochs": 10,
                "optim.warmup_steps": 20,
                "checkpoint.save_steps": STEPS,
            }
            train(EXAMPLE / "train.yaml", work / name, {**common, **settings}, mistake=mistake)
            whole = work / f"{name}_base"
            if not whole.is_dir():
                export = [*("export", str(work / name)), *("--out", str(whole)), "--merge", "--precision", "bf16"]
                subprocess.run([sys.executable, "-m", "ds_higgs", *export], check=True)
            yield {"mistake": mistake, "seed": seed, **counted(judge(name, work, whole))}


def study_adapters(work: Path, seeds: list[int], chosen: list[str]) -> Iterator[dict[str, Any]]:
    for variant in chosen or ADAPTERS:
        settings = ADAPTERS[variant]
        for seed in seeds:
            name = f"{variant} {seed}".replace(" ", "_")
            one_process = {"data.batch_size": 8, "eval.num_audio_samples": 0, "zero.stage": 0}
            common = {"run.seed": seed, "data.cache_dir": work / "codes", **one_process}
            train(EXAMPLE / "new_voice.yaml", work / name, {**common, **settings})
            scores = judge(name, work, EXAMPLE / "base", "--adapter", work / name)
            yield {"setting": variant, "seed": seed, **counted(scores), **last_losses(work / name)}


def counted(scores: dict[str, dict[str, int]]) -> dict[str, str]:
    return {name: f"{score['good']} of {score['of']}" for name, score in scores.items() if name != "codec"}


def last_losses(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluation = [line for line in lines if line["event"] == "eval"][-1]
    return {"audio loss": evaluation["audio_loss"]}


STUDIES = {"mistakes": study_mistakes, "adapters": study_adapters}


def run_training(mistake: str, arguments: list[str]) -> None:
    """In a process of its own: plant the mistake, then do what `ds-higgs train` does."""
    from ds_higgs.cli.main import main as ds_higgs

    if mistake in PLANTED:
        plant(mistake)
    sys.exit(ds_higgs(arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--work", type=Path, required=True, help="folder for speech, runs and scores")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0, and 0 1 2 for adapters")
    parser.add_argument("--only", nargs="+", default=[], choices=[*MISTAKES, *ADAPTERS], metavar="NAME", help="rows")
    arguments = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
    seeds = arguments.seeds or ([0] if arguments.study == "mistakes" else [0, 1, 2])
    rows = []
    for row in STUDIES[arguments.study](arguments.work.resolve(), seeds, arguments.only):
        rows.append(row)
        print(row, flush=True)
    print_table(rows)
    output = RESULTS / f"small_base_{arguments.study}.json"
    write_json(output, {"run": describe_run(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--mistake"]:
        run_training(sys.argv[2], sys.argv[3:])
    main()

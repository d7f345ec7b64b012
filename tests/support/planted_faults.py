"""The voice-cloning example with one fault planted in each of many samples: what `validate` and `inspect` must name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

Sample = dict
Plant = Callable[[Path, Sample], None]


def request_of(sample: Sample) -> dict:
    return sample["messages"][1]["content"][-1]


def answer_of(sample: Sample) -> dict:
    return sample["messages"][2]["content"][0]


def reference_of(sample: Sample) -> dict:
    return next(item for item in sample["messages"][1]["content"] if item["type"] == "audio")


def target_of(sample: Sample) -> dict:
    return sample["messages"][2]["content"][1]


def say(sample: Sample, text: str) -> None:
    request_of(sample)["text"] = f"Please generate speech for: {text}"
    answer_of(sample)["text"] = text


def with_text(change: Callable[[str], str]) -> Plant:
    return lambda folder, sample: say(sample, change(answer_of(sample)["text"]))


def with_audio(change: Callable[[np.ndarray, int], np.ndarray], rate: int | None = None) -> Plant:
    """A target of its own, so that no other sample refers to it."""

    def plant(folder: Path, sample: Sample) -> None:
        source = folder / target_of(sample)["audio_url"]
        samples, found = soundfile.read(source, dtype="float32")
        path = source.with_name(f"planted-{source.stem}.wav")
        soundfile.write(path, change(samples, found), rate or found)
        target_of(sample)["audio_url"] = str(path.relative_to(folder))

    return plant


def add_noise(samples: np.ndarray, rate: int) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=len(samples)).astype(np.float32)
    return samples + 0.2 * float(np.sqrt(np.mean(samples**2))) * noise


def cut_in_speech(samples: np.ndarray, rate: int) -> np.ndarray:
    """Up to the loudest 20 ms of the second half."""
    frame = round(0.02 * rate)
    starts = range(len(samples) // 2, len(samples) - frame, frame)
    loudest = max(starts, key=lambda start: float(np.mean(samples[start : start + frame] ** 2)))
    return samples[: loudest + frame]


def add_vowel_marks(text: str) -> str:
    return "".join(letter + "\u064e" if letter.isalpha() else letter for letter in text)


def remove_reference(folder: Path, sample: Sample) -> None:
    sample["messages"][1]["content"] = [request_of(sample)]


def refer_to_itself(folder: Path, sample: Sample) -> None:
    reference_of(sample)["audio_url"] = target_of(sample)["audio_url"]


def ask_for_something_else(folder: Path, sample: Sample) -> None:
    request_of(sample)["text"] = "Please generate speech for: Something else altogether."


# The index in train.json of the example, the kind of warning that must be found there, and the fault.
PLANTS: dict[int, tuple[str, Plant]] = {
    0: ("digits", with_text(lambda text: f"{text} At 7:30.")),
    1: ("mojibake", with_text(lambda text: f"{text} CafÃ© crÃ¨me.")),
    2: ("replacement", with_text(lambda text: f"caf\ufffd {text}")),
    3: ("scripts", with_text(lambda text: text.replace("e", "е", 1))),
    4: ("markup", with_text(lambda text: f"{text}<br/>")),
    5: ("request", ask_for_something_else),
    6: ("pace", with_text(lambda text: f"{text} {text} {text}")),
    7: ("pace", with_text(lambda text: "Yes.")),
    8: ("clipping", with_audio(lambda samples, _: np.clip(4 * samples, -0.7, 0.7))),
    9: ("noise", with_audio(add_noise)),
    10: ("loudness", with_audio(lambda samples, _: 0.02 * samples)),
    11: ("loudness", with_audio(lambda samples, _: 0.95 * np.tanh(30 * samples))),
    12: ("vowel-marks", with_text(add_vowel_marks)),
    13: ("mojibake", with_text(lambda text: text.encode("cp1256", "ignore").decode("cp1252", "ignore"))),
    14: ("silence", with_audio(lambda samples, rate: np.pad(samples, (0, 2 * rate)))),
    15: ("bandwidth", with_audio(lambda samples, _: samples[::3], rate=8000)),
    16: ("no-reference", remove_reference),
    17: ("own-reference", refer_to_itself),
    18: ("silence", with_audio(lambda samples, rate: np.pad(samples, (2 * rate, 0)))),
    22: ("cut", with_audio(cut_in_speech)),
}
# What is planted between samples: 20 and 23 with the recording of 19, 21 with a reference of the first speaker, 22 with
# a target of the validation set as reference; of that set, 0 with a target of the training set.
BETWEEN = {"train.json:20": "same-audio", "train.json:21": "other-speaker", "train.json:23": "duplicate"}
LEAKED = {"val.json:0": "leak", "val.json:1": "leak"}
EXPECTED = {f"train.json:{index}": kind for index, (kind, _) in PLANTS.items()} | BETWEEN | LEAKED


def write_planted(folder: Path, example: Path) -> tuple[Path, Path]:
    """The two manifests, beside a copy of the example's audio."""
    shutil.copytree(example / "audio", folder / "audio")
    training = json.loads((example / "train.json").read_text())
    validation = json.loads((example / "val.json").read_text())
    first = dict(target_of(training[0]))
    for index, (_, plant) in PLANTS.items():
        plant(folder, training[index])
    target_of(training[20]).update(target_of(training[19]))
    training[23] = training[19]
    reference_of(training[21]).update(first)
    reference_of(training[22]).update(target_of(validation[1]))
    target_of(validation[0]).update(first)
    paths = folder / "train.json", folder / "val.json"
    for path, samples in zip(paths, (training, validation), strict=True):
        path.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    return paths

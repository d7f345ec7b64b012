"""Judge by ear what the small base, or an adapter of it, says: by recordings alone, without any model from outside.

    python examples/small_base/judge.py examples/small_base/base
    python examples/small_base/judge.py examples/small_base/base --adapter outputs/example

a) codec: of the 40 kept recordings, how many are, encoded and decoded, nearest to their own original
b) words: of the sentences spoken, which are in no training set, how many are nearest to the same sentence, of 20 that
   another voice says
c) voice: of the sentences asked for without a reference, how many are nearer to the new voice with the adapter
d) ends: how many end by themselves, neither too early nor too late to have said the sentence

With --draws N each sentence is spoken N times, by seeds 0 to N-1: (b) and (d) count all of them, (c) takes the median
of each sentence, since what is drawn may be near a voice once by chance.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import listening
import numpy as np
import soundfile

from ds_higgs.commands.generate import SpeechOptions, VoiceOptions, load_voice, speak_manifest
from ds_higgs.commands.voice import Voice
from ds_higgs.data.codec.source import AudioCodec
from ds_higgs.model.generation import GREEDY, Sampling

HERE = Path(__file__).parent
JUDGED, NEW_VOICE = HERE / "judged" / "judged.json", HERE / "new_voice" / "val.json"
# Whose recordings tell what a voice has said.
RIVALS = {"low_3": "judged/audio/high_2", "high_2": "judged/audio/low_3", "new": "judged/audio/high_2"}
MAX_SECONDS = 6.0
SAMPLED = Sampling()  # as `ds-higgs generate` does
# Of the recording's length by the voice that was asked for; between the kept voices it is 0.8 to 1.24.
SHORTEST, LONGEST = 0.7, 1.4


@dataclass(frozen=True)
class Said:
    """One sentence as a model said it. number: of the sentence. speaker: of the reference."""

    number: int
    speaker: str
    waveform: np.ndarray
    target: np.ndarray
    ended: bool

    @property
    def ended_in_time(self) -> bool:
        """By itself, after about as long as the recording of the sentence is."""
        return self.ended and SHORTEST <= len(self.waveform) / len(self.target) <= LONGEST


@dataclass(frozen=True)
class Score:
    """So many of so many."""

    good: int
    of: int

    def __str__(self) -> str:
        return f"{self.good} of {self.of}"


def judge_codec(codec: AudioCodec, waveforms: Sequence[np.ndarray]) -> Score:
    """(a): those that come back nearest to their own original."""
    originals = [listening.words(waveform) for waveform in waveforms]
    returned = [listening.words(codec.decode(codes)) for codes in codec.encode(waveforms)]
    own = [listening.nearest(heard, originals) == index for index, heard in enumerate(returned)]
    return Score(sum(own), len(own))


def judge_words(said: Sequence[Said]) -> Score:
    """(b): those nearest to the same sentence by another voice."""
    candidates = {
        speaker: [listening.words(read(file)) for file in rivals(speaker)] for speaker in {s.speaker for s in said}
    }
    right = [listening.nearest(listening.words(s.waveform), candidates[s.speaker]) == s.number for s in said]
    return Score(sum(right), len(right))


def judge_ends(said: Sequence[Said]) -> Score:
    """(d): those that ended by themselves when the sentence can have been said."""
    return Score(sum(one.ended_in_time for one in said), len(said))


def judge_pitch(adapted: Sequence[Said], base: Sequence[Said]) -> Score:
    """(c): sentences whose pitch is nearer to the target's with the adapter; what has no pitch is far from any."""
    return _nearer(adapted, base, lambda said: abs(listening.pitch(said.waveform) - listening.pitch(said.target)))


def judge_spectrum(adapted: Sequence[Said], base: Sequence[Said]) -> Score:
    """(c): sentences whose mean spectrum is nearer to the target's with the adapter."""

    def difference(said: Said) -> float:
        return float(np.abs(listening.spectrum(said.waveform) - listening.spectrum(said.target)).mean())

    return _nearer(adapted, base, difference)


def _nearer(adapted: Sequence[Said], base: Sequence[Said], difference: Callable[[Said], float]) -> Score:
    with_it, without = _median_by_sentence(adapted, difference), _median_by_sentence(base, difference)
    assert with_it.keys() == without.keys()
    return Score(sum(with_it[number] < without[number] for number in without), len(without))


def _median_by_sentence(said: Sequence[Said], difference: Callable[[Said], float]) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for one in said:
        found.setdefault(one.number, []).append(difference(one))
    return {number: float(np.median(np.nan_to_num(values, nan=np.inf))) for number, values in found.items()}


def rivals(speaker: str) -> list[Path]:
    """The recordings of all judged sentences by another voice, in the sentences' order."""
    return sorted(HERE.glob(f"{RIVALS[speaker]}_*.flac"))


def read(file: Path) -> np.ndarray:
    return soundfile.read(file, dtype="float32")[0]


def speak(
    voice: Voice, manifest: Path, out: Path, *, count: int | None, draws: int = 1, sampling: Sampling = SAMPLED
) -> list[Said]:
    """What `voice` says to the first `count` prompts of a manifest (None: all), `draws` times; WAVs go to `out`."""
    samples = json.loads(manifest.read_text(encoding="utf-8"))
    said = []
    for seed in range(draws):
        speech = SpeechOptions(sampling=sampling, seed=seed, max_seconds=MAX_SECONDS)
        for row in speak_manifest(manifest, out / str(seed), voice=voice, speech=speech, count=count):
            sample = samples[int(row["sample_id"].rpartition(":")[2])]
            target = manifest.parent / sample["messages"][-1]["content"]["audio_url"]
            number = int(target.stem.rpartition("_")[2])
            ended = row["stopped_by"] == "eos"
            said.append(Said(number, sample["speaker"], read(Path(row["file"])), read(target), ended))
    return said


def load(base: Path, adapter: Path | None, cache_dir: Path) -> Voice:
    """The base, or an adapter on it, ready to speak as servers ask it to."""
    options = VoiceOptions(base=str(base), adapter=adapter, prompt_form="boson", cache_dir=cache_dir)
    return load_voice(options)[0]


def judge(base: Path, adapter: Path | None, out: Path, **speaking: Any) -> dict[str, Score]:
    """All measures that apply; what is spoken goes to folders of `out`.

    Args:
        speaking: of `speak`.
    """
    voice = load(base, None, out / "codes")
    if adapter is None:
        said = speak(voice, JUDGED, out / "base", **speaking)
        recordings = [read(file) for speaker in ("low_3", "high_2") for file in rivals(speaker)]
        return {
            "codec": judge_codec(voice.codec, recordings),
            "words": judge_words(said),
            "ends": judge_ends(said),
        }
    said = speak(voice, NEW_VOICE, out / "base", **speaking)
    adapted = speak(load(base, adapter, out / "codes"), NEW_VOICE, out / "adapter", **speaking)
    return {
        "words without": judge_words(said),
        "words": judge_words(adapted),
        "pitch nearer": judge_pitch(adapted, said),
        "spectrum nearer": judge_spectrum(adapted, said),
        "ends": judge_ends(adapted),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--adapter", type=Path, help="a run or adapter that was trained on new_voice/")
    parser.add_argument("--count", type=int, help="prompts to speak (default: all)")
    parser.add_argument("--draws", type=int, default=1, help="times that each is spoken (default: 1)")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest code, always: nothing by chance")
    parser.add_argument("--out", type=Path, help="keep what was spoken in this folder")
    parser.add_argument("--json", type=Path, help="write the scores to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scores = judge(
            options.base,
            options.adapter,
            options.out or Path(folder),
            count=options.count,
            draws=options.draws,
            sampling=GREEDY if options.greedy else SAMPLED,
        )
    for name, score in scores.items():
        print(f"{name:16} {score}")
    if options.json is not None:
        text = json.dumps({name: asdict(score) for name, score in scores.items()}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

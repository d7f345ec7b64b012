"""Make the speech that the small base learns from, and its manifests, with espeak-ng.

    python examples/small_base/make_speech.py --out outputs/small_base/speech

Needs espeak-ng 1.51 or later on the PATH. Equal seeds give equal sentences, voices and files.
"""

import argparse
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path

import soundfile
from speech import CODEC_VARIANTS, LANGUAGES, SAMPLE_RATE, SPEAKERS, Language, Speaker, speak, split_sentences, written

PITCH_JITTER = 3
SPEED_JITTER = 12


@dataclass(frozen=True)
class Utterance:
    """A sentence (with vowel marks) in a voice, and its file; `speaker` has the pitch and speed of this very one."""

    file: Path
    text: str
    language: Language
    speaker: Speaker

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(self.file, speak(self.text, self.language, self.speaker), SAMPLE_RATE, subtype="PCM_16")


def training_utterances(folder: Path, *, count: int, seed: int) -> list[Utterance]:
    """`count` utterances, the speakers in turn, a language and a sentence of the training part drawn for each."""
    sentences = {language: split_sentences(language, seed)[0] for language in LANGUAGES}
    generator = random.Random(f"training {seed}")
    drawn = []
    for index in range(count):
        language = generator.choice(LANGUAGES)
        text = generator.choice(generator.choice(sentences[language]))
        speaker = _jittered(SPEAKERS[index % len(SPEAKERS)], generator)
        drawn.append(Utterance(folder / "train" / f"{index:05d}.flac", text, language, speaker))
    return drawn


def held_out_utterances(folder: Path, *, seed: int) -> list[Utterance]:
    """Every held-out sentence once, the speakers in turn."""
    spoken = [(text, language) for language in LANGUAGES for text in split_sentences(language, seed)[1]]
    return [
        Utterance(folder / "val" / f"{index:03d}.flac", text, language, SPEAKERS[index % len(SPEAKERS)])
        for index, (text, language) in enumerate(spoken)
    ]


def codec_utterances(folder: Path, *, count: int, seed: int) -> list[Utterance]:
    """Speech in many more voices, of sentences of the training part: for learn_codec.py alone."""
    generator = random.Random(f"codec {seed}")
    drawn = []
    for index in range(count):
        language = generator.choice(LANGUAGES)
        text = generator.choice(generator.choice(split_sentences(language, seed)[0]))
        speaker = Speaker(
            "any", generator.choice(CODEC_VARIANTS), generator.randint(20, 80), generator.randint(150, 190)
        )
        drawn.append(Utterance(folder / "codec" / f"{index:05d}.flac", text, language, speaker))
    return drawn


def _jittered(speaker: Speaker, generator: random.Random) -> Speaker:
    return replace(
        speaker,
        pitch=speaker.pitch + generator.randint(-PITCH_JITTER, PITCH_JITTER),
        speed=speaker.speed + generator.randint(-SPEED_JITTER, SPEED_JITTER),
    )


def build_samples(targets: Sequence[Utterance], references: Sequence[Utterance], seed: int) -> Iterator[dict]:
    """A sample for each target, with another utterance of its speaker as the reference."""
    generator = random.Random(f"references {seed}")
    of_speaker: dict[str, list[Utterance]] = {}
    for utterance in references:
        of_speaker.setdefault(utterance.speaker.name, []).append(utterance)
    for target in targets:
        candidates = of_speaker[target.speaker.name]
        reference = target
        while reference is target:
            reference = generator.choice(candidates)
        yield build_sample(target, reference)


def build_sample(target: Utterance, reference: Utterance) -> dict:
    """One sample in the form that servers use: `target` is asked for in the voice of `reference`."""
    return {
        "messages": [
            {"role": "user", "content": written(reference.text)},
            {"role": "assistant", "content": _audio(reference)},
            {"role": "user", "content": written(target.text)},
            {"role": "assistant", "content": _audio(target)},
        ],
        "start_index": 3,
        "speaker": target.speaker.name,
    }


def _audio(utterance: Utterance) -> dict:
    return {"type": "audio", "audio_url": str(Path(*utterance.file.parts[-2:]))}


def require_espeak(parser: argparse.ArgumentParser) -> None:
    """End the program where espeak-ng is missing."""
    if shutil.which("espeak-ng") is None:
        parser.error("espeak-ng is not installed (Debian and Ubuntu: apt-get install espeak-ng)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for audio, train.json and val.json")
    parser.add_argument("--count", type=int, default=24_000, help="training utterances (default: 24000)")
    parser.add_argument("--codec-count", type=int, default=1_500, help="utterances for the codec (default: 1500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    require_espeak(parser)
    train = training_utterances(options.out, count=options.count, seed=options.seed)
    val = held_out_utterances(options.out, seed=options.seed)
    codec = codec_utterances(options.out, count=options.codec_count, seed=options.seed)
    with Pool(options.processes) as pool:
        pool.map(Utterance.write, [*codec, *val, *train], chunksize=50)
    for name, targets in (("train.json", train), ("val.json", val)):
        samples = list(build_samples(targets, train, options.seed))
        (options.out / name).write_text(json.dumps(samples, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {len(samples)} samples")


if __name__ == "__main__":
    main()

"""Make the speech that the small base learns from, and its manifests, with espeak-ng.

    python examples/small_base/make_speech.py --out outputs/small_base/speech

Needs espeak-ng 1.51 or later on the PATH. Equal seeds give equal sentences, voices and files.
"""

import argparse
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path

import soundfile
from speech import (
    CODEC_VARIANTS,
    HIGHEST_PITCH,
    LANGUAGES,
    OTHER_VARIANTS,
    SAMPLE_RATE,
    SPEAKERS,
    Language,
    Speaker,
    speak,
    split_sentences,
    written,
)

PITCH_JITTER = 3
SPEED_JITTER = 12
EACH = 8  # utterances of each of many voices


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
        text, language = _any_sentence(sentences, generator)
        speaker = _jittered(SPEAKERS[index % len(SPEAKERS)], generator, pitch=PITCH_JITTER, speed=SPEED_JITTER)
        drawn.append(Utterance(folder / "train" / f"{index:05d}.flac", text, language, speaker))
    return drawn


def held_out_utterances(folder: Path, *, seed: int) -> list[Utterance]:
    """Every held-out sentence once, the speakers in turn."""
    spoken = [(text, language) for language in LANGUAGES for text in split_sentences(language, seed)[1]]
    return [
        Utterance(folder / "val" / f"{index:03d}.flac", text, language, SPEAKERS[index % len(SPEAKERS)])
        for index, (text, language) in enumerate(spoken)
    ]


def other_utterances(
    folder: Path, *, variants: Sequence[str], highest_pitch: int, count: int, seed: int
) -> list[Utterance]:
    """Sentences of the training part, each by a voice of its own at any pitch."""
    generator = random.Random(f"{folder.name} {seed}")
    sentences = {language: split_sentences(language, seed)[0] for language in LANGUAGES}
    drawn = []
    for index in range(count):
        text, language = _any_sentence(sentences, generator)
        variant = generator.choice(variants)
        pitch, speed = generator.randint(20, highest_pitch), generator.randint(150, 190)
        speaker = Speaker(f"{folder.name}_{index:05d}", variant, pitch, speed)
        drawn.append(Utterance(folder / f"{index:05d}.flac", text, language, speaker))
    return drawn


def copied_utterances(folder: Path, *, speakers: int, each: int, seed: int) -> list[Utterance]:
    """Sentences of the training part by many speakers, at any pitch, who say `each` of them."""
    generator = random.Random(f"{folder.name} {seed}")
    sentences = {language: split_sentences(language, seed)[0] for language in LANGUAGES}
    drawn = []
    for number in range(speakers):
        variant = generator.choice(OTHER_VARIANTS)
        pitch, speed = generator.randint(20, HIGHEST_PITCH), generator.randint(155, 185)
        speaker = Speaker(f"voice_{number:04d}", variant, pitch, speed)
        for index in range(each):
            text, language = _any_sentence(sentences, generator)
            jittered = _jittered(speaker, generator, pitch=1, speed=6)
            drawn.append(Utterance(folder / f"{number:04d}_{index}.flac", text, language, jittered))
    return drawn


def _any_sentence(
    sentences: Mapping[Language, Sequence[Sequence[str]]], generator: random.Random
) -> tuple[str, Language]:
    language = generator.choice(LANGUAGES)
    return generator.choice(generator.choice(sentences[language])), language


def _jittered(speaker: Speaker, generator: random.Random, *, pitch: int, speed: int) -> Speaker:
    return replace(
        speaker,
        pitch=speaker.pitch + generator.randint(-pitch, pitch),
        speed=speaker.speed + generator.randint(-speed, speed),
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


def build_sample(target: Utterance, reference: Utterance | None = None) -> dict:
    """One sample in the form that servers use: `target` is asked for in the voice of `reference`."""
    turns = [target] if reference is None else [reference, target]
    messages = [
        message
        for utterance in turns
        for message in (
            {"role": "user", "content": written(utterance.text)},
            {"role": "assistant", "content": _audio(utterance)},
        )
    ]
    return {"messages": messages, "start_index": len(messages) - 1, "speaker": target.speaker.name}


def _audio(utterance: Utterance) -> dict:
    return {"type": "audio", "audio_url": str(Path(*utterance.file.parts[-2:]))}


def require_espeak(parser: argparse.ArgumentParser) -> None:
    """End the program where espeak-ng is missing."""
    if shutil.which("espeak-ng") is None:
        parser.error("espeak-ng is not installed (Debian and Ubuntu: apt-get install espeak-ng)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for audio and manifests")
    parser.add_argument("--count", type=int, default=24_000, help="training utterances (default: 24000)")
    parser.add_argument("--varied-count", type=int, default=6_000, help="each by another voice (default: 6000)")
    parser.add_argument("--voices", type=int, default=1_500, help="speakers of 8 utterances each (default: 1500)")
    parser.add_argument("--codec-count", type=int, default=1_500, help="utterances for the codec (default: 1500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    require_espeak(parser)
    train = training_utterances(options.out, count=options.count, seed=options.seed)
    val = held_out_utterances(options.out, seed=options.seed)
    voices = copied_utterances(options.out / "voices", speakers=options.voices, each=EACH, seed=options.seed)
    varied, codec = (
        other_utterances(options.out / name, variants=variants, highest_pitch=highest, count=count, seed=options.seed)
        for name, variants, highest, count in (
            ("varied", OTHER_VARIANTS, HIGHEST_PITCH, options.varied_count),
            ("codec", CODEC_VARIANTS, 80, options.codec_count),
        )
    )
    with Pool(options.processes) as pool:
        pool.map(Utterance.write, [*codec, *val, *train, *varied, *voices], chunksize=50)
    manifests = {
        "train.json": list(build_samples(train, train, options.seed)),
        "val.json": list(build_samples(val, train, options.seed)),
        "voices.json": list(build_samples(voices, voices, options.seed)),
        "varied.json": [build_sample(utterance) for utterance in varied],
    }
    for name, samples in manifests.items():
        (options.out / name).write_text(json.dumps(samples, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {len(samples)} samples")


if __name__ == "__main__":
    main()

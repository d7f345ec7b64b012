"""What the small base can say and in which voices: sentences of a small vocabulary, spoken by espeak-ng."""

import itertools
import random
import subprocess
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import librosa
import numpy as np

SAMPLE_RATE = 24_000
PEAK = 0.7
SILENCE_THRESHOLD_DB = 50
HELD_OUT_PER_LANGUAGE = 40  # sentences that no training utterance says

Language = Literal["en", "ar"]
LANGUAGES: tuple[Language, ...] = ("en", "ar")


@dataclass(frozen=True)
class Speaker:
    """An espeak-ng variant, which speaks both languages, with its pitch (0 to 99) and speed (words per minute)."""

    name: str
    variant: str
    pitch: int
    speed: int


SPEAKERS = (
    Speaker("low_1", "m1", 48, 170),
    Speaker("low_2", "m2", 62, 175),
    Speaker("low_3", "m3", 40, 165),
    Speaker("low_4", "m7", 75, 170),
    Speaker("high_1", "f1", 45, 170),
    Speaker("high_2", "f2", 60, 175),
    Speaker("high_3", "f3", 40, 165),
    Speaker("high_4", "f4", 72, 170),
)
# The base has never heard it: a timbre of its own.
NEW_SPEAKER = Speaker("new", "f5", 75, 165)
# Besides SPEAKERS, for the codec: it has to render any voice.
CODEC_VARIANTS = ("m4", "m5", "m6", "m8", "f5", "Andy", "Alicia", "linda", "steph", "klatt2")
HIGHEST_PITCH = 95
# Of the many other voices that it hears.
OTHER_VARIANTS = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8"),
    *("f1", "f2", "f3", "f4"),
    *("Andy", "Alicia", "linda", "steph", "klatt2", "belinda", "anika", "ed"),
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# With vowel marks, which espeak-ng needs; the text that the model reads has none (`written`).
WORDS: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "number": _words("zero one two three four five six seven eight nine ten"),
        "day": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
        "name": _words("Adam Sara Omar Lina David Maria"),
        "to_people": _words("call meet help visit"),
        "to_things": _words("open close start stop"),
        "thing": _words("door window music engine"),
        "on": ("on",),
        "at": ("at",),
        "said": ("said",),
    },
    "ar": {
        "number": _words("صِفْر وَاحِد اِثْنَان ثَلَاثَة أَرْبَعَة خَمْسَة سِتَّة سَبْعَة ثَمَانِيَة تِسْعَة عَشَرَة"),
        "day": _words("الاِثْنَيْن الثُّلَاثَاء الأَرْبِعَاء الخَمِيس الجُمُعَة السَّبْت الأَحَد"),
        "name": _words("آدَم سَارَة عُمَر لِينَا دَاوُد مَرْيَم"),
        "to_people": _words("كَلِّم قَابِل سَاعِد زُرْ"),
        "to_things": _words("اِفْتَح أَغْلِق شَغِّل أَوْقِف"),
        "thing": _words("البَاب النَّافِذَة المُوسِيقَى المُحَرِّك"),
        "on": ("يَوْم",),
        "at": ("السَّاعَة",),
        "said": ("قَال",),
    },
}
PATTERNS = (
    ("to_people", "name", "on", "day"),
    ("to_things", "thing", "number"),
    ("name", "said", "number", "number"),
    ("day", "at", "number"),
    ("number", "number", "number"),
    ("number", "number", "number", "number"),
)


def written(spoken: str) -> str:
    """A sentence without vowel marks, as people write it and as the model reads it."""
    kept = (mark for mark in unicodedata.normalize("NFD", spoken) if unicodedata.combining(mark) not in range(27, 36))
    return unicodedata.normalize("NFC", "".join(kept))


def all_sentences(language: Language) -> list[list[str]]:
    """Every sentence (with vowel marks) of the vocabulary, in one list per pattern."""
    words = WORDS[language]
    return [
        [" ".join(sentence) for sentence in itertools.product(*(words[kind] for kind in pattern))]
        for pattern in PATTERNS
    ]


def split_sentences(language: Language, seed: int) -> tuple[list[list[str]], list[str]]:
    """The sentences for training, in one list per pattern, and HELD_OUT_PER_LANGUAGE that are kept from it."""
    generator = random.Random(f"{language} {seed}")
    training, held_out = [], []
    for index, sentences in enumerate(all_sentences(language)):
        generator.shuffle(sentences)
        share = len(range(index, HELD_OUT_PER_LANGUAGE, len(PATTERNS)))
        held_out.append(sentences[:share])
        training.append(sentences[share:])
    return training, [one for group in itertools.zip_longest(*held_out) for one in group if one is not None]


def speak(text: str, language: Language, speaker: Speaker) -> np.ndarray:
    """Return espeak-ng's speech of `text`: mono float32 at SAMPLE_RATE, trimmed, its peak at PEAK."""
    voice = {"en": "en-us", "ar": "ar"}[language] + f"+{speaker.variant}"
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        command = ["espeak-ng", "-v", voice, "-p", str(speaker.pitch), "-s", str(speaker.speed), "-w", str(wav)]
        subprocess.run([*command, text], check=True)
        waveform, _ = librosa.load(wav, sr=SAMPLE_RATE, mono=True)
    waveform, _ = librosa.effects.trim(waveform, top_db=SILENCE_THRESHOLD_DB)
    return waveform * (PEAK / np.abs(waveform).max())

"""The kinds of warnings, and every threshold with its reason."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """weight: 3 spoils what is learned, 2 harms it, 1 is to be known; advice: what to do about it."""

    weight: int
    title: str
    advice: str


KINDS: dict[str, Kind] = {
    "pace": Kind(3, "Text and audio do not fit", "listen: text or audio is cut off, or belongs to another sample"),
    "cut": Kind(3, "Cut off in speech", "take the recording to its end: the model learns to stop anywhere"),
    "request": Kind(3, "The request is not what is answered", "give both the same text"),
    "same-audio": Kind(3, "One recording, several texts", "keep the text that is said"),
    "leak": Kind(3, "Validation is heard in training", "hold it out: `ds-higgs manifest --split` keeps them apart"),
    "own-reference": Kind(3, "The reference is the target", "take another recording of the speaker as reference"),
    "other-speaker": Kind(3, "The reference is of another speaker", "take a recording of the target's speaker"),
    "mojibake": Kind(3, "Text read in a wrong encoding", "read the source again, as UTF-8"),
    "replacement": Kind(3, "Characters were lost", "read the source again, in its own encoding"),
    "scripts": Kind(2, "Two scripts in one word", "write the word in one script: the letters only look alike"),
    "digits": Kind(2, "Digits", "write numbers as they are said"),
    "markup": Kind(2, "Markup in the text", "leave out what is not said"),
    "vowel-marks": Kind(2, "Arabic vowel marks in some samples only", "mark all texts, or none"),
    "clipping": Kind(2, "Clipped", "take a recording with a lower level; the model learns the distortion"),
    "noise": Kind(2, "Noisy", "clean it or leave it out; the model learns the noise"),
    "duplicate": Kind(2, "The same sample again", "keep one of them, unless the weight is meant"),
    "loudness": Kind(1, "Loudness out of line", "bring the recordings to one loudness"),
    "silence": Kind(1, "Long silence at an end", "cut it: the model learns to begin late, or not to end"),
    "bandwidth": Kind(1, "Low sampling rate", "leave telephone audio out, unless that voice is meant"),
    "no-reference": Kind(1, "No reference", "give it one, if voices shall be cloned"),
    "speakers": Kind(1, "Few speakers", "right for one voice; cloning others gets worse"),
}


@dataclass(frozen=True)
class Limits:
    """Where a warning begins."""

    # Letters a second. The fastest speakers reach about 25 in alphabets; CJK signs come at 3 or more.
    fastest: float = 30.0
    slowest: float = 1.5
    # Against the median of the set's script: people differ by 1.5 or so, and cut-off texts by 2 and more.
    pace_factor: float = 2.0
    # Shorter clips have a pace by chance.
    pace_seconds: float = 1.0
    # Samples before a median tells something.
    enough: int = 8
    # Share of samples that stand at the highest value in runs of three or more: undistorted audio has none.
    clipped_share: float = 2e-4
    # Speech above the quietest twentieth of the clip, dB: a quiet room gives 35 and more, a street 10 to 15.
    noise_db: float = 15.0
    # Of speech, dBFS. Broadcast is near -23, a voice note -15; below -45, 16 bits and a codec lose detail.
    quietest_dbfs: float = -45.0
    loudest_dbfs: float = -6.0
    # Of the last 20 ms below the speech, dB: what has died away is 30 and more below, a street 15.
    cut_db: float = 12.0
    # Against the set's median: 12 dB is a voice from another room.
    loudness_db: float = 12.0
    # Speech begins and ends within 0.5 s where it was cut by hand or by a voice detector.
    silence_seconds: float = 1.0
    # The codec's 24 kHz holds 12 kHz; telephone audio has 4, and voices miss their s below 6.5.
    lowest_rate: int = 16_000
    # Vowel marks a letter: full marking has 0.6 to 0.9, a word's one mark against ambiguity under 0.1.
    marked: float = 0.3
    bare: float = 0.1
    arabic_letters: int = 8  # of a text before its marks are counted
    # Voices that one adapter must know before it can be expected to clone others; the fewest of any public recipe.
    speakers: int = 4
    # Of the samples that repeat the request: where most do, the others are mistakes.
    repeating: float = 0.5


LIMITS = Limits()


@dataclass(frozen=True)
class DataWarning:
    """A warning about one sample, or about a whole manifest (`number` None, `sample` its name)."""

    kind: str
    file: str
    number: int | None
    sample: str
    message: str

    @property
    def weight(self) -> int:
        return KINDS[self.kind].weight

    def __str__(self) -> str:
        return f"{self.sample}: {self.message}"

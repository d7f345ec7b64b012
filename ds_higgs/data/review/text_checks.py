"""Warnings about texts: one small function a kind, each over all samples of a manifest."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

from ds_higgs.data.review.kinds import LIMITS, DataWarning
from ds_higgs.data.review.samples import ReviewedSample

# A run of what UTF-8 looks like when it is read as one of the one-byte encodings of the West.
WESTERN_RUN = re.compile(
    r"[\u0080-\u00ff\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]{2,}"
)
ACCENTED_WORD = re.compile(r"\b[\u00c0-\u00ff]{4,}\b")
TAG = re.compile(
    r"</?(?:a|b|br|div|em|font|i|p|span|strong|u)\b[^<>]*>|&(?:amp|lt|gt|quot|nbsp|#\d+);|https?://\S+", re.I
)
ONE_BYTE_ENCODINGS = ("cp1252", "latin-1")


def find_mojibake(samples: Sequence[ReviewedSample]) -> Iterator[DataWarning]:
    for sample in samples:
        if (found := mojibake_in(sample.text)) is not None:
            yield sample.warn("mojibake", f"{found[0]!r} was {found[1]!r}, read in a wrong encoding")


def mojibake_in(text: str) -> tuple[str, str] | None:
    """What stands there and what was meant; None where nothing looks like a wrong encoding."""
    for run in WESTERN_RUN.findall(text):
        for encoding in ONE_BYTE_ENCODINGS:
            try:
                return run, run.encode(encoding).decode("utf-8")
            except UnicodeError:
                continue
    for word in ACCENTED_WORD.findall(text):  # Arabic in Windows' own encoding, read as a western one
        meant = word.encode("latin-1").decode("cp1256", errors="replace")
        if all(script_of(letter) == "ARABIC" for letter in meant):
            return word, meant
    return None


def find_replacements(samples: Sequence[ReviewedSample]) -> Iterator[DataWarning]:
    for sample in samples:
        if count := sample.text.count("\ufffd"):
            yield sample.warn("replacement", f"{count} times U+FFFD: characters that were lost")


def find_mixed_scripts(samples: Sequence[ReviewedSample]) -> Iterator[DataWarning]:
    for sample in samples:
        for word in sample.text.split():
            scripts = sorted({script for letter in word if (script := script_of(letter)) is not None})
            if len(scripts) > 1 and not any(script.startswith(("CJK", "HIRA", "KATA")) for script in scripts):
                yield sample.warn("scripts", f"{word!r} has letters of {' and '.join(map(str.capitalize, scripts))}")
                break


def script_of(letter: str) -> str | None:
    """The first word of a letter's Unicode name, None for what is no letter or belongs to all scripts."""
    return unicodedata.name(letter, "").split(" ")[0] if unicodedata.category(letter) in ("Lu", "Ll", "Lo") else None


def find_digits(samples: Sequence[ReviewedSample]) -> Iterator[DataWarning]:
    for sample in samples:
        numbers = re.findall(r"\d+", sample.text)
        if numbers:
            yield sample.warn("digits", f"digits that may be said in several ways: {', '.join(numbers[:3])}")


def find_markup(samples: Sequence[ReviewedSample]) -> Iterator[DataWarning]:
    for sample in samples:
        if (found := TAG.search(sample.text)) is not None:
            yield sample.warn("markup", f"{found[0][:40]!r} is not said")


def find_mixed_vowel_marks(samples: Sequence[ReviewedSample]) -> Iterator[DataWarning]:
    """The fewer of the marked and of the bare Arabic texts, where there are both."""
    marked, bare = [], []
    for sample in samples:
        letters = sum(script_of(letter) == "ARABIC" for letter in sample.text)
        marks = sum(is_vowel_mark(letter) for letter in sample.text)
        if letters >= LIMITS.arabic_letters:
            if marks >= LIMITS.marked * letters:
                marked.append(sample)
            elif marks < LIMITS.bare * letters:
                bare.append(sample)
    fewer, has, others = (marked, "has", "have none") if len(marked) <= len(bare) else (bare, "lacks", "have them")
    if marked and bare:
        for sample in fewer:
            yield sample.warn("vowel-marks", f"{has} vowel marks; {max(len(marked), len(bare))} other texts {others}")


def is_vowel_mark(letter: str) -> bool:
    """Fathatan to sukun, and dagger alef."""
    return "\u064b" <= letter <= "\u0652" or letter == "\u0670"


def find_different_requests(samples: Sequence[ReviewedSample]) -> Iterator[DataWarning]:
    """Answers that the request does not hold, where it does in most samples."""
    both = [sample for sample in samples if sample.request is not None and sample.answer is not None]
    different = [sample for sample in both if _plain(str(sample.answer)) not in _plain(str(sample.request))]
    if len(different) <= (1 - LIMITS.repeating) * len(both):
        for sample in different:
            shown = " ".join(str(sample.request).split())[-60:]
            yield sample.warn("request", f"the request asks for other words than the answer has: {shown!r}")


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def count_letters(text: str) -> tuple[str, int]:
    """The script of most letters, and how many sounds they may stand for: a digit is said in about three letters."""
    scripts = Counter(script for letter in text if (script := script_of(letter)) is not None)
    digits = sum(letter.isdigit() for letter in text)
    return (scripts.most_common(1)[0][0] if scripts else ""), sum(scripts.values()) + 3 * digits


TEXT_CHECKS = (
    *(find_mojibake, find_replacements, find_mixed_scripts, find_digits, find_markup, find_mixed_vowel_marks),
    find_different_requests,
)

"""Word and character error rates, with texts normalised as speech is: case, punctuation and Arabic spelling aside."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

TATWEEL = "\u0640"
# Written with or without hamza, madda or wasla, and with or without dots: the same letter to a listener.
ARABIC_LETTER_FORMS = str.maketrans({"أ": "ا", "إ": "ا", "آ": "ا", "ٱ": "ا", "ى": "ي", "ی": "ي"})


@dataclass(frozen=True)
class ErrorCount:
    """Edits (insertions, deletions, substitutions) that turn hypotheses into references of `length` units."""

    edits: int
    length: int

    def __add__(self, other: "ErrorCount") -> "ErrorCount":
        return ErrorCount(self.edits + other.edits, self.length + other.length)

    @property
    def rate(self) -> float:
        """Edits per unit; over 1 where much is inserted. Of no units at all: 0 without edits, else 1."""
        return self.edits / self.length if self.length else float(self.edits > 0)


def normalise_text(text: str) -> str:
    """Lower case, no punctuation or diacritics, single spaces, ASCII digits, one form of alef and ya, no tatweel."""
    letters = unicodedata.normalize("NFKC", text).replace(TATWEEL, "").translate(ARABIC_LETTER_FORMS)
    return " ".join("".join(_normalise_character(letter) for letter in letters.casefold()).split())


def _normalise_character(letter: str) -> str:
    category = unicodedata.category(letter)
    if category == "Mn" and unicodedata.name(letter, "").startswith(("ARABIC", "QURANIC")):
        return ""  # vowel marks, shadda, sukun, dagger alef
    if category == "Nd":
        return str(unicodedata.decimal(letter))
    if category[0] == "P" and letter not in "'’":
        return " "
    return letter


def count_word_errors(reference: str, hypothesis: str) -> ErrorCount:
    """Errors in words, after normalising both."""
    return _count_errors(normalise_text(reference).split(), normalise_text(hypothesis).split())


def count_character_errors(reference: str, hypothesis: str) -> ErrorCount:
    """Errors in characters, spaces left out, after normalising both."""
    texts = (normalise_text(text).replace(" ", "") for text in (reference, hypothesis))
    return _count_errors(*texts)


def total_errors(counts: Iterable[ErrorCount]) -> ErrorCount:
    """The errors of a whole set: long texts weigh more than short ones."""
    return sum(counts, start=ErrorCount(0, 0))


def _count_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorCount:
    return ErrorCount(edits=Levenshtein.distance(reference, hypothesis), length=len(reference))

"""Normalisation and error rates, on pairs with known answers."""

import pytest

from ds_higgs.speech.transcripts import (
    ErrorCount,
    count_character_errors,
    count_word_errors,
    normalise_text,
    total_errors,
)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("Hello,  World!", "hello world"),
        ("It’s 5 o'clock", "it’s 5 o'clock"),
        ("السَّلامُ عَلَيْكُمْ", "السلام عليكم"),
        ("مرحبـــا", "مرحبا"),
        ("أحمد إلى آخر ٱلله", "احمد الي اخر الله"),
        ("كتابٌ، ما هذا؟", "كتاب ما هذا"),
        ("هٰذا", "هذا"),
        ("سنة ٢٠٢٤", "سنة 2024"),
        ("ﻣﺮﺣﺒﺎ", "مرحبا"),
        ("café naïve", "café naïve"),
        ("", ""),
        ("؟!", ""),
    ],
)
def test_normalisation(text: str, normalised: str):
    assert normalise_text(text) == normalised
    assert normalise_text(normalised) == normalised


@pytest.mark.parametrize(
    ("reference", "hypothesis", "edits", "length"),
    [
        ("a b c", "a b c", 0, 3),
        ("a b c", "a x c", 1, 3),
        ("a b c", "a c", 1, 3),
        ("a b c", "a b b c", 1, 3),
        ("a b c", "", 3, 3),
        ("", "a b", 2, 0),
        ("the cat sat", "cat the sat on", 3, 3),
        ("أهلًا وسهلًا", "اهلا وسهلا", 0, 2),
    ],
)
def test_word_errors(reference: str, hypothesis: str, edits: int, length: int):
    assert count_word_errors(reference, hypothesis) == ErrorCount(edits, length)


def test_character_errors_leave_spaces_out():
    assert count_character_errors("kitten", "sitting") == ErrorCount(3, 6)
    assert count_character_errors("ab c", "abc") == ErrorCount(0, 3)


def test_rates():
    assert ErrorCount(1, 4).rate == 0.25
    assert ErrorCount(0, 0).rate == 0.0
    assert ErrorCount(2, 0).rate == 1.0
    assert total_errors([ErrorCount(1, 1), ErrorCount(0, 9)]).rate == 0.1

"""The optional judges run with real transformers classes, tiny and random."""

from pathlib import Path

import numpy as np
import pytest

from ds_higgs.errors import UserError
from ds_higgs.speech.judges import SpeakerJudge, Transcriber
from tests.support.judges import write_letter_recogniser, write_speaker_model, write_whisper

RATE = 24_000
ONE_FRAME = 960


def sweep(start: float, stop: float, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * (start + (stop - start) * time / seconds / 2) * time)).astype(np.float32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("judges")
    writers = {"voice": write_speaker_model, "letters": write_letter_recogniser, "whisper": write_whisper}
    return {name: str(write(folder / name)) for name, write in writers.items()}


@pytest.mark.costly
def test_a_voice_is_most_like_itself(models: dict[str, str]):
    judge = SpeakerJudge(models["voice"])
    low, high = sweep(100, 200), sweep(2000, 4000)
    assert judge.similarity(low, low, sampling_rate=RATE) == pytest.approx(1.0, abs=1e-5)
    assert judge.similarity(low, high, sampling_rate=RATE) < 1 - 1e-5
    assert judge.embed(low, sampling_rate=RATE).norm() == pytest.approx(1.0, abs=1e-5)
    assert judge.embed(low[:ONE_FRAME], sampling_rate=RATE).norm() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.costly
def test_a_recogniser_writes_its_letters(models: dict[str, str]):
    transcriber = Transcriber(models["letters"])
    text = transcriber.transcribe(sweep(100, 4000), sampling_rate=RATE)
    assert set(text) <= set("abcdefgh <>unks/")
    assert text == transcriber.transcribe(sweep(100, 4000), sampling_rate=RATE)
    assert isinstance(transcriber.transcribe(sweep(100, 4000)[:ONE_FRAME], sampling_rate=RATE), str)


@pytest.mark.costly
def test_whisper_hears_short_and_long_speech_in_its_language(models: dict[str, str]):
    transcriber = Transcriber(models["whisper"], language="Arabic")
    for seconds in (0.04, 1, 31):
        assert isinstance(transcriber.transcribe(sweep(100, 4000, seconds), sampling_rate=RATE), str)
    assert transcriber.num_bytes > 0
    with pytest.raises(UserError, match="knows no language 'klingon'; expected one of arabic, english"):
        Transcriber(models["whisper"], language="klingon").load()
    with pytest.raises(UserError, match="this recogniser takes no language; found 'arabic'"):
        Transcriber(models["letters"], language="arabic").load()


def test_a_model_that_is_not_there_is_the_users_mistake(tmp_path: Path):
    with pytest.raises(UserError, match="speech recogniser"):
        Transcriber(str(tmp_path)).transcribe(sweep(100, 200), sampling_rate=RATE)
    with pytest.raises(UserError, match="speaker model"):
        SpeakerJudge(str(tmp_path)).embed(sweep(100, 200), sampling_rate=RATE)

"""Judges that listen on the GPU and wait on the CPU: they hear there what they hear here."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ds_higgs.speech.judges import SpeakerJudge, Transcriber
from ds_higgs.speech.judging import Judges
from tests.support.judges import write_speaker_model, write_whisper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RATE = 24_000


def hear(judges: Judges) -> tuple[str, float]:
    assert judges.transcriber is not None
    assert judges.speaker is not None
    low, high = (0.3 * np.sin(np.arange(RATE) * pitch).astype(np.float32) for pitch in (0.02, 0.3))
    text = judges.transcriber.transcribe(high, sampling_rate=RATE)
    return text, judges.speaker.similarity(low, high, sampling_rate=RATE)


def test_judges_hear_on_the_gpu_and_wait_on_the_cpu(tmp_path: Path):
    transcriber = Transcriber(str(write_whisper(tmp_path / "whisper")), language="arabic")
    judges = Judges(transcriber, SpeakerJudge(str(write_speaker_model(tmp_path / "voice"))))
    judges.load()
    text, similarity = hear(judges)
    with judges.on("cuda"):
        assert hear(judges) == (text, pytest.approx(similarity, abs=1e-3))
        assert {weight.device.type for weight in transcriber._pipeline.model.parameters()} == {"cuda"}
    assert {weight.device.type for weight in transcriber._pipeline.model.parameters()} == {"cpu"}
    assert hear(judges) == (text, pytest.approx(similarity, abs=1e-6))

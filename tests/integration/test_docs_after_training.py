"""Every command and every piece of Python in docs/after_training.md runs, in the order of the page."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_higgs.adapters.native import save_native_model
from ds_higgs.cli.main import run as run_command
from ds_higgs.data.codec.opening import load_codec
from ds_higgs.model.loading import load_model
from tests.support.launching import ROOT
from tests.support.runs import write_run

PAGE = (ROOT / "docs" / "after_training.md").read_text(encoding="utf-8")
NATIVE_PYTHON = os.environ.get("DS_HIGGS_NATIVE_PYTHON")
SHORT = {"generate": ["--max-seconds", "0.4"], "evaluate": ["--max-seconds", "0.4", "--count", "1"]}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def place(tiny_base: Path, example_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the page takes for granted: a run, a voice, a manifest, base checkpoints."""
    folder = tmp_path_factory.mktemp("place")
    write_run(folder / "out", tiny_base, val_manifest=example_dir / "val.json")
    (folder / "out" / "adapters" / "step-00000005").rename(folder / "out" / "adapters" / "step-00000500")
    shutil.copy(example_dir / "audio" / "speaker_003_00.flac", folder / "me.flac")
    shutil.copytree(example_dir / "audio", folder / "audio")
    samples = json.loads((example_dir / "val.json").read_text())
    (folder / "val.json").write_text(json.dumps(samples[:2]))
    (folder / "BASE").symlink_to(tiny_base)
    save_native_model(load_model(tiny_base, dtype=torch.float32), folder / "BASE_NATIVE", eos_token_id=504)
    return folder


def test_every_command(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    commands = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 16
    for program, command, *arguments in commands:
        assert program == "ds-higgs"
        run_command([command, *arguments, *SHORT.get(command, [])])
    for made in ("hello.wav", "spoken/samples.jsonl", "evaluation/evaluation.json", "out/report.html"):
        assert (place / made).is_file(), made
    for made in ("adapter", "adapter_500", "merged", "merged_fp32", "adapter_native", "merged_native"):
        assert (place / made / "README.md").is_file(), made


def test_the_pieces_for_boson(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The serve engine is boson's own; only its audio tokenizer, a download, is replaced by the tiny base's codec."""
    monkeypatch.chdir(place)
    adapter, serve = (block for block in blocks("python") if "boson_multimodal" in block)
    exec(adapter, {})
    module = types.ModuleType("higgs_audio_tokenizer")
    module.load_higgs_audio_tokenizer = lambda *_, **__: CodecAsTokenizer(place / "BASE" / "codec")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "boson_multimodal.audio_processing.higgs_audio_tokenizer", module)
    exec(serve, {})
    rate, samples = map(int, capsys.readouterr().out.split()[-2:])
    assert rate == 24_000
    assert samples > 0


class CodecAsTokenizer:
    """The interface of boson's HiggsAudioTokenizer around an AudioCodec."""

    def __init__(self, folder: Path):
        self._codec = load_codec(folder)
        self.sampling_rate = self._codec.sampling_rate
        self.tps = self._codec.sampling_rate // self._codec.hop_length

    def encode(self, waveform: np.ndarray, sampling_rate: int) -> torch.Tensor:
        assert sampling_rate == self.sampling_rate
        return self._codec.encode([waveform])[0]

    def decode(self, codes: torch.Tensor) -> np.ndarray:
        return self._codec.decode(codes[0])[None, None]


def test_the_pieces_for_transformers(place: Path):
    """The second one fetches the released codec; tests/native speaks with the tiny one."""
    piece, speaking = (block for block in blocks("python") if "HiggsAudioV2" in block)
    for one in (piece, speaking):
        compile(one, "after_training.md", "exec")
    if NATIVE_PYTHON is None:
        pytest.skip("DS_HIGGS_NATIVE_PYTHON names no environment")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([NATIVE_PYTHON, "-c", piece], cwd=place, env=environment, check=True)

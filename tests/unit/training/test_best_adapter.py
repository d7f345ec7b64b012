"""adapters/best in the background: a copy of the weights as they were, whole or not at all, and its errors."""

from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ds_higgs.adapters.record import AdapterRecord
from ds_higgs.checkpoint import Background
from ds_higgs.model.loading import load_model
from ds_higgs.model.trained import make_trainable
from ds_higgs.training.best_adapter import BestAdapter

NAME = "layers.0.audio_mlp.up_proj.weight"
WHAT = {"mode": "full", "base": "base", "revision": None}


@pytest.fixture
def weight(tiny_base) -> torch.nn.Parameter:
    """The one that is trained."""
    model = make_trainable(load_model(tiny_base, dtype=torch.float32), mode="full", only=NAME, lora={})
    found = model.get_parameter(NAME)
    found.model = model
    return found


def best_adapter(weight, folder: Path, **settings) -> BestAdapter:
    engine = SimpleNamespace(module=SimpleNamespace(peft_model=weight.model), zero_optimization_stage=lambda: 0)
    return BestAdapter(engine, folder, **{"background": Background(), "tolerate_errors": False, **settings})


def write(best: BestAdapter, done: list[str]) -> None:
    position = {"step": 5, "samples_seen": 5, "audio_targets_seen": 5}
    record = AdapterRecord.of(position, {"run": {"seed": 0}}, where="a test")
    best.write(lambda: done.append("done"), record=record, **WHAT)


def test_the_copy_is_written_while_the_weights_go_on_and_the_old_one_is_whole_meanwhile(weight, tmp_path):
    folder, done, may_write = tmp_path / "best", [], Event()
    background = Background()
    best = best_adapter(weight, folder, background=background)
    first = weight.detach().clone()
    write(best, done)
    best.finish()
    background.submit(may_write.wait)
    weight.data += 1
    write(best, done)
    weight.data += 1
    assert done == ["done"]
    assert load_file(folder / "trained.safetensors")[NAME].equal(first)
    may_write.set()
    best.finish()
    assert done == ["done", "done"]
    assert load_file(folder / "trained.safetensors")[NAME].equal(first + 1)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("tolerate", [True, False])
def test_what_cannot_be_written_is_told_or_raised_and_no_checkpoint_says_that_it_was(
    weight, tmp_path, background, tolerate, caplog
):
    (tmp_path / "file").write_text("in the place of a folder")
    settings = {"background": Background() if background else None, "tolerate_errors": tolerate}
    best, done = best_adapter(weight, tmp_path / "file" / "best", **settings), []

    def write_and_finish() -> None:
        write(best, done)
        best.check(best.under_way)
        best.finish()

    if tolerate:
        write_and_finish()
        assert "going on without it" in caplog.text
    else:
        with pytest.raises(OSError, match=r"rank 0: could not save .*best"):
            write_and_finish()
    assert done == []

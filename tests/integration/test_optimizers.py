"""Muon and 8-bit AdamW in real engines on two ranks: as a plain loop on the whole batch, and exact on resume."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.muon.original_muon import muon_update

from ds_higgs.config import OptimConfig
from ds_higgs.model.tiny import write_tiny_base
from ds_higgs.training.step_module import StepModule
from tests.support import launching
from tests.support.parity import add_gradients, build_model, micro_batches, parity_config, trainable

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("workers") / "optimizers.py"
MUON = {"type": "muon", "max_grad_norm": 0, "learning_rate": 5e-3, "adam_learning_rate": 1e-2}


@pytest.fixture(scope="module")
def small_base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "base"
    write_tiny_base(folder, hidden_size=64, num_layers=2, intermediate_size=96)
    return folder


def train(optim: dict, zeros: list[dict], base: Path, folder: Path) -> list[dict]:
    settings = [{"name": f"{number}", "optim": optim, "zero": zero} for number, zero in enumerate(zeros)]
    (folder / "settings.json").write_text(json.dumps(settings))
    done = launching.run_ranks(2, WORKER, base, folder, folder / "settings.json")
    assert done.returncode == 0, done.stdout[-6000:]
    return list(torch.load(folder / "results.pt", weights_only=True).values())


def plain(optim: OptimConfig, base: Path, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Muon for the layers' matrices, torch's AdamW for all else, in one process on the whole batch in fp32."""
    module = StepModule(build_model(parity_config(base, train={"mode": "full"})))
    masters = trainable(module.peft_model)
    of_muon = {name: torch.zeros_like(one) for name, one in masters.items() if "layers." in name and one.dim() == 2}
    others = [one for name, one in masters.items() if name not in of_muon]
    adam = torch.optim.AdamW(others, lr=optim.adam_learning_rate, eps=optim.eps, weight_decay=optim.weight_decay)
    batches, losses = micro_batches(base, "all audio", count=2), []
    for _ in range(steps):
        losses.append(add_gradients(module, batches, masters))
        for name, momentum in of_muon.items():
            update = muon_update(masters[name].grad, momentum, beta=optim.muon_momentum)
            masters[name].mul_(1 - optim.learning_rate * optim.weight_decay).sub_(update, alpha=optim.learning_rate)
        adam.step()
        module.peft_model.load_state_dict(masters, strict=False)
    return losses, masters


@pytest.mark.parametrize(
    "zeros",
    [
        [{"stage": stage} for stage in (0, 1, 2, 3)],
        [{"stage": stage, "offload_optimizer": True} for stage in (1, 2, 3)],
        [{"stage": stage, "precision": "bf16"} for stage in (0, 1, 2, 3)],
    ],
    ids=["fp32", "offload", "bf16"],
)
def test_muon_is_the_plain_one_at_every_stage(zeros, small_base, tmp_path):
    results = train(MUON, zeros, small_base, tmp_path)
    with torch.compiler.set_stance("force_eager"):
        losses, weights = plain(parity_config(small_base, train={"mode": "full"}, optim=MUON).optim, small_base, 3)
    for zero, found in zip(zeros, results, strict=True):
        assert found["goes_on_exactly"], zero
        assert found["losses"] == sorted(found["losses"], reverse=True), zero
        bf16 = zero.get("precision") == "bf16"
        assert found["losses"][:3] == pytest.approx(losses, rel=1e-3 if bf16 else 1e-5), zero
        if not bf16:
            for name, weight in weights.items():
                torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=f"{zero}: {name}")


@pytest.mark.parametrize(
    "zeros",
    [[{"stage": 2}], [{"stage": stage, "precision": "bf16"} for stage in (0, 1, 2, 3)]],
    ids=["fp32", "bf16"],
)
def test_8_bit_adamw_learns_as_adamw_does(zeros, small_base, tmp_path):
    """On a CPU, which bitsandbytes 0.50 and later can."""
    pytest.importorskip("bitsandbytes", minversion="0.50")
    optim = {"learning_rate": 1e-3, "eps": 1e-8}
    in_8_bits = train({"type": "adamw_8bit", **optim}, zeros, small_base, tmp_path)
    full = train(optim, zeros, small_base, tmp_path)
    for zero, found, expected in zip(zeros, in_8_bits, full, strict=True):
        assert found["goes_on_exactly"], zero
        assert found["losses"] != expected["losses"], zero
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-2), zero

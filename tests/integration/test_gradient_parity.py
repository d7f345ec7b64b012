"""DeepSpeed at every stage against plain torch on the whole batch, in fp32: same gradient norm and updated weights."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch

from ds_higgs.losses import build_targets
from ds_higgs.model.tiny import write_tiny_base
from ds_higgs.training.train_step import LossWeights, StepModule
from tests.support import launching
from tests.support.parity import ROUNDING, SCENARIOS, STEPS, build_model, micro_batches, parity_config, trainable

PROGRAM = Path(__file__).parent / "workers" / "parity.py"


def settings(ranks: int, *, every: bool = False) -> list[dict]:
    """Stages, offload, accumulation 1, 2, 4 and scenarios: every pair of their values, or `every` combination.

    Without audio on rank 1 up to stage 2.
    """
    found = []
    for stage, offload, accumulation, scenario in product((0, 1, 2, 3), (False, True), (1, 2, 4), SCENARIOS):
        if ranks * accumulation > 8 or (offload and stage == 0) or (stage == 3 and scenario != "all audio"):
            continue
        if not every and stage < 3 and (scenario == "all audio") == (offload == (accumulation == 2)):
            continue
        zero = {"stage": stage, "offload_optimizer": offload}
        name = f"{stage} offload={offload} accumulation={accumulation} {scenario}"
        found.append({"name": name, "scenario": scenario, "accumulation": accumulation, "zero": zero})
    for stage in (1, 2, 3):
        overlap = {"stage": stage, "overlap_comm": True}
        scenario = "all audio" if stage == 3 else "rank 1 without audio"
        found.append({"name": f"{stage} overlap", "scenario": scenario, "accumulation": 2, "zero": overlap})
    return found


@pytest.fixture(scope="module")
def small_base(tmp_path_factory) -> Path:
    """Two layers: the settings are many."""
    folder = tmp_path_factory.mktemp("small") / "base"
    write_tiny_base(folder, hidden_size=64, num_layers=2, intermediate_size=96)
    return folder


def clip_gradients(parameters: list[torch.nn.Parameter], max_norm: float) -> float:
    """Scale gradients to a norm of `max_norm` at most; the norm before, summed up in double.

    torch's own clipping is no reference: on a CPU its fp32 norm of some 10^5 numbers is 1e-5 too small.
    """
    norm = math.sqrt(sum(parameter.grad.double().square().sum().item() for parameter in parameters))
    for parameter in parameters:
        parameter.grad.mul_(min(1.0, max_norm / norm))
    return norm


@pytest.fixture(scope="module")
def plain(small_base):
    """One process, the whole batch, torch's own AdamW."""

    def train(scenario: str) -> dict:
        config = parity_config(small_base)
        model = build_model(config)
        module = StepModule(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=config.optim.learning_rate, eps=config.optim.eps, weight_decay=config.optim.weight_decay
        )
        weights = LossWeights.build(text=1.0, audio=1.0, codebooks=None, num_codebooks=8)
        batches = micro_batches(small_base, scenario, count=2)
        targets = [build_targets(batch, placeholder_ids=module.placeholder_ids) for batch in batches]
        scales = weights.scales(sum(one.counts() for one in targets)).float()
        losses, norms = [], []
        for _ in range(STEPS):
            optimizer.zero_grad()
            outputs = [module(batch.model_inputs, one, scales) for batch, one in zip(batches, targets, strict=True)]
            loss = sum(output.loss for output in outputs)
            loss.backward()
            norms.append(clip_gradients(parameters, config.optim.max_grad_norm))
            losses.append(loss.item())
            optimizer.step()
        return {"grad_norms": norms, "losses": losses, "weights": trainable(model)}

    return {scenario: train(scenario) for scenario in SCENARIOS}


def settings_of_four(ranks: int) -> list[dict]:
    """1 x 4 and 4 x 1 micro-batches, beside 2 x 2."""
    plain_stage = {"stage": 2, "offload_optimizer": False}
    return [s for s in settings(ranks, every=True) if s["zero"] == plain_stage and ranks * s["accumulation"] == 4]


@pytest.mark.parametrize(
    ("ranks", "chosen"),
    [
        pytest.param(1, settings_of_four(1), id="1"),
        pytest.param(2, settings(2), id="2"),
        pytest.param(4, settings_of_four(4), id="4"),
        pytest.param(2, settings(2, every=True), id="2-every", marks=pytest.mark.slow),
    ],
)
def test_every_split_gives_the_gradient_of_the_whole_batch(ranks, chosen, small_base, plain, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(chosen))
    output = tmp_path / "results.pt"

    done = launching.run(launching.deepspeed(ranks, PROGRAM, small_base, output, tmp_path / "settings.json"))

    assert done.returncode == 0, done.stdout[-4000:]
    results = torch.load(output, weights_only=True)
    for setting in chosen:
        found, expected = results[setting["name"]], plain[setting["scenario"]]
        assert found["losses"] == pytest.approx(expected["losses"], rel=ROUNDING), setting["name"]
        assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=ROUNDING), setting["name"]
        for name, weight in expected["weights"].items():
            other = found["weights"][name]
            torch.testing.assert_close(other, weight, rtol=1e-5, atol=1e-5, msg=f"{setting['name']}: {name}")

"""The benchmarks' plain step and ours: equal losses and LoRA gradients at toy shapes, for every variant."""

import dataclasses
import importlib
import json
import sys
from types import ModuleType

import pytest
import torch

from ds_higgs.batch import IGNORE_INDEX, Batch, Labels
from tests.support.launching import ROOT


@pytest.fixture(scope="module")
def benchmarks() -> dict[str, ModuleType]:
    """The scripts as modules, by name."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        names = ("workload", "step", "h200", "measure", "losses", "communication")
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.pop(0)


def build_batch(workload: ModuleType, config, kind: str) -> Batch:
    shapes = {
        "usual": [(14, 5, 6, 9), (9, 12, 3, 20), (20, 3, 8, 4)],
        "one sample": [(11, 4, 5, 7)],
        "one without text labels": [(14, 5, 6, 9), (9, 12, 3, 20)],
    }
    batch = workload.make_batch(config, [workload.SampleShape(*shape) for shape in shapes[kind]])
    if kind != "one without text labels":
        return batch
    text = batch.labels.text.clone()
    text[1] = IGNORE_INDEX
    return dataclasses.replace(batch, labels=Labels(text=text, audio=batch.labels.audio))


@pytest.mark.costly
@pytest.mark.parametrize("kind", ["usual", "one sample", "one without text labels"])
def test_every_variant_has_the_plain_steps_losses_and_gradients(benchmarks, kind: str):
    workload, step = benchmarks["workload"], benchmarks["step"]
    config = workload.small_config(hidden_size=128, num_layers=3, vocab_size=1500)
    batch = build_batch(workload, config, kind)
    found = {}
    for variant in step.VARIANTS:
        model = workload.build_random_lora_model(config, dtype=torch.float32, device=torch.device("cpu"), rank=4)
        loss, losses = step.build_loss_function(variant, model, batch)()
        loss.backward()
        grads = [weight.grad.flatten() for weight in model.parameters() if weight.requires_grad]
        found[variant] = (loss.detach(), losses, torch.cat(grads))
    loss, losses, grads = found.pop("plain")
    for variant, (other_loss, other_losses, other_grads) in found.items():
        assert torch.allclose(other_loss, loss, rtol=1e-6, atol=0), variant
        assert torch.allclose(other_losses.float(), losses.float(), rtol=1e-6, atol=0), variant
        assert (other_grads - grads).norm() < 1e-6 * grads.norm(), variant


def test_a_batch_holds_about_as_many_positions_as_asked_for(benchmarks):
    workload = benchmarks["workload"]
    config = workload.small_config(hidden_size=128, num_layers=1)
    batch = workload.make_batch(config, [workload.SampleShape.of_length(length) for length in (460, 500)])
    assert batch.num_tokens == pytest.approx(960, rel=0.02)


def test_fused_losses_are_those_of_the_loop(benchmarks):
    losses, cpu = benchmarks["losses"], torch.device("cpu")
    cases = {**losses.codebook_cases(31, cpu)}, {**losses.text_cases(40, 7, 16, 301, cpu)}
    for case in cases:
        rows = losses.measure(case, calls=1, device=cpu)
        assert max(row["loss_error"] for row in rows) < 1e-6
        assert max(row["grad_error"] for row in rows) < 1e-6


def test_the_released_model_has_the_known_active_parameters(benchmarks):
    released = benchmarks["workload"].released_model_config()
    assert benchmarks["workload"].active_parameters(released) == benchmarks["communication"].ACTIVE_PARAMETERS


def test_every_h200_case_is_at_the_released_shapes_or_tiny(benchmarks):
    h200 = benchmarks["h200"]
    cases = h200.list_cases(cuda=False, tiny=False)
    assert {case.step for case in cases} == {"plain", "ours"}
    assert {case.batch_size for case in cases if case.step == "plain"} <= {case.batch_size for case in cases}
    assert max(case.batch_size for case in h200.list_cases(cuda=False, tiny=True)) <= 4
    assert h200.predicted_tokens_per_second(h200.Case()) > 30_000
    assert h200.predicted_tokens_per_second(h200.Case(grouped_lora=False)) is None
    on_a_gpu = h200.list_cases(cuda=True, tiny=False)
    assert h200.Case(attention="varlen") in on_a_gpu
    assert h200.Case(quantization="fp8") in on_a_gpu
    listed = h200.list_cases(cuda=True, tiny=False, everything=True)
    assert {case.quantization for case in listed} == {None, "fp8", "nf4"}
    assert {case.attention for case in listed} == {"sdpa", "varlen", "flash_attention_2"}
    rising = ({"recompute": 1, "compiled": False}, {"compiled": False}, {}, {"attention": "varlen"})
    predicted = [h200.predicted_tokens_per_second(h200.Case(**changes)) for changes in rising]
    assert predicted == sorted(predicted)


def test_each_choice_of_h200_is_decided_against_the_default_at_its_batch(benchmarks):
    h200 = benchmarks["h200"]
    speeds = {h200.Case(): 100.0, h200.Case(kernels="liger", compiled=False): 110.0, h200.Case(recompute=1): 70.0}
    speeds |= {h200.Case(batch_size=16): 130.0, h200.Case("plain", **h200.STOCK_LAYERS): 20.0}
    rows = [{**dataclasses.asdict(case), "tokens/s": speed, "peak_gib": 1.0} for case, speed in speeds.items()]
    liger, full, fastest = h200.decide(
        [*rows, {**dataclasses.asdict(h200.Case(dropout=0.0)), "status": "out of memory"}]
    )
    assert (liger["choice"], liger["speed"], liger["take it"]) == ("kernels: liger, compiled: False", 1.1, True)
    assert (full["choice"], full["speed"], full["take it"]) == ("recompute: 1", 0.7, False)
    assert (fastest["at"], fastest["tokens/s"]) == ("16 x 500", 130.0)


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda file: file.name)
def test_kept_results_name_machine_versions_and_command(file):
    run = json.loads(file.read_text())["run"]
    assert run["command"].startswith("python benchmarks/")
    assert run["device"]
    assert run["versions"]["torch"]

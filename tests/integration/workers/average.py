"""What every rank of test_average runs: an average beside the masters of real engines, saved, split anew, loaded.

    torchrun --nproc_per_node 2 tests/integration/workers/average.py CASE FOLDER STAGE PRECISION

Each case ends with status 0 when it holds and raises otherwise.
"""

from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from ds_higgs.checkpoint import find_checkpoint, load_checkpoint
from ds_higgs.checkpoint.deepspeed_parts import AVERAGE, masters, whole_parameters
from ds_higgs.checkpoint.weights import CheckpointWeights
from ds_higgs.job.process_exit import run_and_exit
from ds_higgs.training.average import Average, forget_average
from tests.integration.workers.cases import run_cases
from tests.integration.workers.checkpoint import FIXED, build_engine, resume, save, train

DECAY = 0.3  # reached with the third update

Named = dict[str, torch.Tensor]


def it_is_plain_torchs(run_dir: Path, stage: int, precision: str) -> None:
    """Of the masters after each step; and the model is the averaged one as long as it is in place."""
    engine = build_engine(stage, precision)
    average, expected = Average(engine, DECAY), whole_masters(engine)
    for step in range(5):
        train(engine, range(step, step + 1))
        average.update(step + 1)
        decay = (2 / 11, 3 / 12, DECAY, DECAY, DECAY)[step]
        expected = {name: decay * expected[name] + (1 - decay) * now for name, now in whole_masters(engine).items()}
    found = whole_average(engine)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)
    trained, before = whole_masters(engine), whole_weights(engine)
    with average.in_place():
        assert_equal(whole_weights(engine), {name: value.to(before[name].dtype) for name, value in found.items()})
    assert_equal(whole_weights(engine), before)
    assert_equal(whole_masters(engine), trained)
    assert any(not torch.equal(trained[name], value) for name, value in found.items())


def it_goes_on_exactly(run_dir: Path, stage: int, precision: str) -> None:
    """Bit for bit; from a checkpoint without one it begins with the weights, and one that is not wanted goes."""
    engine = build_engine(stage, precision)
    average = Average(engine, DECAY)
    assert_equal(read(save(engine, run_dir, 0), averaged=True), read(find(run_dir), averaged=False))
    advance(engine, average, range(3))
    path = save(engine, run_dir, 3)
    assert_equal(read(path, averaged=True), whole_average(engine))
    advance(engine, average, range(3, 6))
    expected = whole_average(engine)

    again = build_engine(stage, precision)
    average = Average(again, DECAY)
    advance(again, average, range(1))
    resume(again, path)
    average.take_over()
    advance(again, average, range(3, 6))
    assert_equal(whole_average(again), expected)

    forget_average(again)
    without = save(again, run_dir, 6)
    third = build_engine(stage, precision)
    resume(third, without)
    average = Average(third, DECAY)
    with average.in_place():
        assert_equal(whole_masters(third), whole_masters(again))


def it_is_saved(run_dir: Path, stage: int, precision: str) -> None:
    """The source of another number of ranks."""
    engine = build_engine(stage, precision)
    advance(engine, Average(engine, DECAY), range(3))
    save(engine, run_dir, 3)
    if engine.global_rank == 0:
        torch.save(whole_average(engine), run_dir / "average.pt")
    else:
        whole_average(engine)


def it_is_the_sources(run_dir: Path, stage: int, precision: str) -> None:
    source = run_dir.with_name("it_is_saved")
    engine = build_engine(stage, precision)
    average = Average(engine, DECAY)
    load_checkpoint(engine, find(source), fixed=FIXED)
    average.take_over()
    assert_equal(whole_average(engine), torch.load(source / "average.pt"))
    held = sum(value.numel() for value in average._values)
    of_all = sum(value.numel() for value in whole_masters(engine).values())
    assert stage == 0 or held < of_all / engine.dp_world_size + 64, (held, of_all)  # 64: padding
    advance(engine, average, range(3, 4))


def advance(engine, average: Average, steps: range) -> None:
    for step in steps:
        train(engine, range(step, step + 1))
        average.update(step + 1)


def find(run_dir: Path) -> Path:
    return find_checkpoint(run_dir, resume="auto")


def read(path: Path, *, averaged: bool) -> Named:
    weights = CheckpointWeights(path, CheckpointWeights.open(path).marker, averaged=averaged)
    return {name: weights.read(name).clone() for name in weights.shapes}


def trained_parameters(engine) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, one) for name, one in engine.module.named_parameters() if one.requires_grad]


def whole_weights(engine) -> Named:
    """As the model has them."""
    found = {}
    for name, parameter in trained_parameters(engine):
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            found[name] = parameter.detach().clone()
    return found


def whole_masters(engine) -> Named:
    if engine.zero_optimization_stage():
        return {name: safe_get_full_fp32_param(one).float().clone() for name, one in trained_parameters(engine)}
    return of_stage_0(engine, [master.detach().clone() for master in masters(engine)])


def whole_average(engine) -> Named:
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return of_stage_0(engine, [engine.optimizer.state[master][AVERAGE].clone() for master in masters(engine)])
    if stage in (1, 2):  # the API below is told of states that there were at the first step alone
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    return {name: safe_get_full_optimizer_state(one, AVERAGE).clone() for name, one in trained_parameters(engine)}


def of_stage_0(engine, tensors: list[torch.Tensor]) -> Named:
    names = [engine.param_names[parameter] for parameter in whole_parameters(engine)]
    return dict(zip(names, tensors, strict=True))


def assert_equal(found: Named, expected: Named) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


run_and_exit(lambda: run_cases(globals()))

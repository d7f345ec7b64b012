"""What every rank of test_checkpoint_engine runs: save, go on, load into a fresh engine, go on again, compare.

    torchrun --nproc_per_node 2 tests/integration/workers/checkpoint.py CASE FOLDER STAGE PRECISION

Each case ends with status 0 when it holds and raises otherwise.
"""

import os
import re
from pathlib import Path
from threading import Event

import deepspeed
import pytest
import torch
import torch.distributed.tensor  # peft looks it up without importing it
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ds_higgs.adapters.from_checkpoint import read_adapter_weights
from ds_higgs.checkpoint import (
    Background,
    CheckpointSaveError,
    Commit,
    PendingCheckpoint,
    begin_checkpoint,
    capture_random_state,
    find_checkpoint,
    load_checkpoint,
    restore_random_state,
)
from ds_higgs.checkpoint.marker import MARKER_NAME, FileRecord, encode_marker, read_marker
from ds_higgs.errors import UserError
from ds_higgs.files import hash_file
from ds_higgs.job.process_exit import run_and_exit
from tests.integration.workers.cases import run_cases

FIXED = {"model.base": "tiny", "lora.rank": 4}


class Net(nn.Module):
    """Two frozen layers under LoRA with dropout and one trained whole; odd sizes, so that ZeRO pads its partitions."""

    def __init__(self, rank: int, targets: tuple[str, ...]):
        super().__init__()
        base = nn.Sequential()
        base.up, base.act, base.down = nn.Linear(7, 13, bias=False), nn.Tanh(), nn.Linear(13, 5, bias=False)
        base.head = nn.Linear(5, 3)
        settings = {"target_modules": list(targets), "modules_to_save": ["head"]}
        lora = LoraConfig(r=rank, lora_alpha=8, lora_dropout=0.3, **settings)
        self.peft_model = get_peft_model(base, lora)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.peft_model(x).float().square().mean()


def build_engine(stage: int, precision: str, *, lr: float = 1e-2, clip: float = 1.0, rank=4, targets=("up", "down")):
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "torch_adam": True, "fused": True}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": precision == "bf16"},
        "gradient_clipping": clip,
    }
    model = Net(rank, targets)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    groups = [
        {"params": [weight for name, weight in trained.items() if "lora_A" in name]},
        {"params": [weight for name, weight in trained.items() if "lora_B" in name], "lr": 4 * lr},
        {"params": [weight for name, weight in trained.items() if "modules_to_save" in name], "lr": lr / 2},
    ]
    return deepspeed.initialize(
        model=model,
        model_parameters=groups,
        config=config,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    )[0]


def train(engine, steps: range) -> list[float]:
    """Losses of some steps; a step's data depends on the step and the rank alone."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + engine.global_rank)
        x = torch.randn(2, 7, generator=generator)
        loss = engine(x.bfloat16() if engine.bfloat16_enabled() else x)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def begin(engine, run_dir: Path, step: int, background: Background | None = None) -> PendingCheckpoint:
    return begin_checkpoint(
        engine,
        run_dir,
        step=step,
        state={"step": step, "position": [step, 2 * step]},
        rank_state=capture_random_state(),
        commit=Commit(keep_latest=2),
        fixed=FIXED,
        background=background,
    )


def save(engine, run_dir: Path, step: int, background: Background | None = None) -> Path:
    return begin(engine, run_dir, step, background).finish()


def resume(engine, path: Path) -> dict:
    state, rank_state = load_checkpoint(engine, path, fixed=FIXED)
    restore_random_state(rank_state)
    return state


def resume_is_exact(run_dir: Path, stage: int, precision: str) -> None:
    engine = build_engine(stage, precision)
    train(engine, range(3))
    path = save(engine, run_dir, 3)
    expected = train(engine, range(3, 7))
    again = build_engine(stage, precision)
    train(again, range(1))
    assert find_checkpoint(run_dir, resume="auto") == path
    assert resume(again, path) == {"step": 3, "position": [3, 6]}
    assert train(again, range(3, 7)) == expected
    assert again.global_steps == 7


def a_save_in_the_background_is_of_its_step(run_dir: Path, stage: int, precision: str) -> None:
    """The weights go on while nothing is written yet; the next save, in the same memory, is of its own step too."""
    engine, background = build_engine(stage, precision), Background()
    first = save(engine, run_dir, 0, background)
    for steps in (range(3), range(3, 5)):
        train(engine, steps)
        held = Event()
        background.submit(held.wait)
        pending = begin(engine, run_dir, steps.stop, background)
        expected = train(engine, range(steps.stop, steps.stop + 2))
        assert not pending.is_ready
        assert steps.start or find_checkpoint(run_dir, resume=str(run_dir)) == first
        held.set()
        again = build_engine(stage, precision)
        resume(again, pending.finish())
        assert train(again, range(steps.stop, steps.stop + 2)) == expected
        engine = again


def frozen_weights_are_left_out(run_dir: Path, stage: int, precision: str) -> None:
    path = save(build_engine(stage, precision), run_dir, 1)
    for file in path.glob("*model_states.pt"):
        names = torch.load(file, weights_only=False)["module"]
        assert names, file
        assert all("lora_" in name or ".modules_to_save." in name for name in names), names
    assert not [entry.name for entry in path.parent.iterdir() if entry.suffix == ".py"]


def config_wins(run_dir: Path, stage: int, precision: str) -> None:
    engine = build_engine(stage, precision, lr=1e-2, clip=1.0)
    train(engine, range(3))
    path = save(engine, run_dir, 3)
    engine = build_engine(stage, precision, lr=8e-4, clip=0.25)
    resume(engine, path)
    assert engine.get_lr() == [2e-4, 8e-4, 1e-4]  # the new rates where the schedule was: 8e-4 / (1 + 3)
    train(engine, range(3, 4))
    assert engine.get_lr() == [8e-4 / 5, 4 * 8e-4 / 5, 8e-4 / 2 / 5]
    if stage:
        assert engine.optimizer.clip_grad == 0.25


def other_shapes_are_refused(run_dir: Path, stage: int, precision: str) -> None:
    path = save(build_engine(stage, precision), run_dir, 1)
    expect_refusal(build_engine(stage, precision, rank=2), path, "lora_A.default.weight has shape [4, 7] in it and [2")
    expect_refusal(build_engine(stage, precision, targets=("up",)), path, "is in it and is not trained now")
    expect_refusal(build_engine(stage, precision), path, "lora.rank: 4 in the checkpoint, 8 now", lora_rank=8)
    other = 1 if stage == 2 else 2
    expect_refusal(build_engine(other, precision), path, f"zero.stage: {stage} in the checkpoint, {other} now")


def expect_refusal(engine, path: Path, message: str, lora_rank: int = 4) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as refusal:
        load_checkpoint(engine, path, fixed={**FIXED, "lora.rank": lora_rank})
    assert "to go on from it: set these as they are in the checkpoint; to start anew: --checkpoint.resume" in str(
        refusal.value
    )


def code_in_a_file_is_refused(run_dir: Path, stage: int, precision: str) -> None:
    """Files made to run code, under a valid marker, are refused by resume and by export, and nothing of them runs."""
    engine = build_engine(stage, precision)
    train(engine, range(1))
    path = save(engine, run_dir, 1)
    assert read_adapter_weights(path)
    exported = {"*optim_states.pt": stage == 3, "*model_states.pt": True}  # what an export reads
    for kind in exported if stage else ["*model_states.pt"]:
        torch.distributed.barrier()  # the other rank has read what is forged now
        if engine.global_rank == 0:
            forge(path, kind, runs=run_dir / "it-ran")
        torch.distributed.barrier()
        with pytest.raises(UserError, match=r"_states.pt: refused: .*mkdir"):
            load_checkpoint(build_engine(stage, precision), path)
        if exported[kind]:
            with pytest.raises(UserError, match=r"_states.pt: refused: .*mkdir"):
                read_adapter_weights(path)
        assert not (run_dir / "it-ran").exists(), kind


class RunsCode:
    """What a pickle can be made to do: unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def forge(path: Path, kind: str, *, runs: Path) -> None:
    """Let the files of a checkpoint run code when they are unpickled, and its marker vouch for them."""
    marker = read_marker(path)
    for file in path.glob(kind):
        torch.save({**torch.load(file, weights_only=False), "extra": RunsCode(runs)}, file)
        marker.files[file.name] = FileRecord(file.stat().st_size, hash_file(file))
    (path / MARKER_NAME).write_bytes(encode_marker(marker))


def whole_state_is_saved(run_dir: Path, stage: int, precision: str) -> None:
    """The source of another world size: a checkpoint, and its masters and moments gathered by DeepSpeed's own API."""
    engine = build_engine(stage, precision)
    train(engine, range(3))
    save(engine, run_dir, 3)
    torch.save(whole_state(engine), run_dir / f"whole-{engine.global_rank}.pt")


def whole_state_is_the_sources(run_dir: Path, stage: int, precision: str) -> None:
    source = run_dir.with_name("whole_state_is_saved")
    engine = build_engine(stage, precision)
    state, rank_state = load_checkpoint(engine, find_checkpoint(source, resume="auto"), fixed=FIXED)
    assert state["step"] == engine.global_steps == 3
    assert rank_state is None, "another number of ranks has no generators to continue"
    for name, expected in torch.load(source / "whole-0.pt").items():
        torch.testing.assert_close(whole_state(engine)[name], expected, rtol=0, atol=0, msg=name)
    expected_weights = torch.load(source / "whole-0.pt")
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                torch.testing.assert_close(parameter.float(), expected_weights[f"{name} weight"], rtol=0, atol=0)
    train(engine, range(3, 5))
    assert adam_step(engine) == 5, "every group counts for itself"
    save(engine, run_dir, 5)


def whole_state(engine) -> dict[str, torch.Tensor]:
    """Weights in training, fp32 masters and Adam's moments, whole and by name."""
    state = {"step": torch.tensor(float(adam_step(engine)))}
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        # The API below leaves this to the next step, and does it once the first group has a state, for that one alone.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                state[f"{name} weight"] = parameter.detach().float().clone()
            if stage:
                state[f"{name} master"] = safe_get_full_fp32_param(parameter).float().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                moment = (
                    safe_get_full_optimizer_state(parameter, key) if stage else engine.optimizer.state[parameter][key]
                )
                state[f"{name} {key}"] = moment.float().clone()
    return state


def adam_step(engine) -> float:
    optimizer = engine.optimizer if engine.optimizer is engine.basic_optimizer else engine.optimizer.optimizer
    [step] = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    return step


def one_ranks_full_disk_is_told_to_all(run_dir: Path, stage: int, precision: str) -> None:
    """The last rank's shard goes to a device that is always full."""
    engine = build_engine(stage, precision)
    train(engine, range(1))
    background = Background()
    path = save(engine, run_dir, 1, background)
    last = torch.distributed.get_world_size() - 1
    engine._get_zero_ckpt_name = _full_device_for(engine, last)
    for way in (None, background):
        with pytest.raises(CheckpointSaveError, match=f"rank {last}: .*No space left"):
            save(engine, run_dir, 2, way)
    del engine._get_zero_ckpt_name
    assert find_checkpoint(run_dir, resume="auto") == path
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["latest", path.name]
    train(engine, range(1, 3))
    assert save(engine, run_dir, 3).name == "step-00000003"


def _full_device_for(engine, rank: int):
    usual = engine._get_zero_ckpt_name
    return lambda *args: "/dev/full" if engine.global_rank == rank else usual(*args)


if __name__ == "__main__":
    run_and_exit(lambda: run_cases(globals()))

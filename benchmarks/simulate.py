"""A training step at the released model's shapes on a simulated GPU: kernels, waits, memory and the time they predict.

    python benchmarks/simulate.py                # peak memory of 24 settings against `ds-higgs estimate`, and tokens/s
    python benchmarks/simulate.py --operations   # where the predicted time of 16 x 500 goes
    python benchmarks/simulate.py --layers 3     # quicker, and without meaning for memory and speed

Nothing is computed (see `simulated_cuda.py`). Predicted times count, for every kernel, the larger of its FLOPs over
790 TFLOP/s (the measured peak of large bf16 products on an H200), its bytes over 85 % of 4.8 TB/s, and 2 us; a step
takes that, or 5 us a launch if the host is slower. They are predictions; nothing here was measured on a GPU.
"""

from simulated_cuda import SimulatedCuda, simulated_cuda  # isort: skip  (before torch)

import argparse
import dataclasses
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import simulated_liger
import torch
from measure import GIB, describe_run, print_table, write_json
from simulated_work import H200, Account, Work
from workload import SampleShape, active_parameters, build_random_lora_model, make_batch, plain_loss

from ds_higgs.batch import Batch, Labels, ModelInputs
from ds_higgs.losses import Targets, build_targets
from ds_higgs.model.loading import released_model_config
from ds_higgs.model.lora import count_parameters, unwrap
from ds_higgs.model.parts import TARGETS
from ds_higgs.model.patches import apply_patches
from ds_higgs.sizing.estimator import CHECKPOINTING_CHOICES, describe_checkpointing
from ds_higgs.sizing.flops import PEAK_FLOPS
from ds_higgs.sizing.inputs import BatchShape, Policy
from ds_higgs.sizing.memory import estimate_memory
from ds_higgs.sizing.shape import model_shape
from ds_higgs.training.step_module import StepModule

BATCH_SIZES = (2, 8, 16)
POSITIONS = (500, 2000)
SECONDS_PER_LAUNCH = 5e-6


@dataclasses.dataclass(frozen=True)
class Setting:
    """A step to simulate.

    layers: None for the released model's 28. recompute: every N-th layer, None for none. whole: parts that are trained
    whole, those with LoRA otherwise in place of it.
    """

    batch_size: int = 2
    positions: int = 500
    recompute: int | None = None
    layers: int | None = None
    step: str = "ours"
    dropout: float = 0.05
    kernels: str = "torch"
    whole: tuple[str, ...] = ()

    @property
    def targets(self) -> list[str]:
        return [path for path in TARGETS if path not in self.whole]

    def lengths(self) -> list[int]:
        spread = max(1, self.positions // 10)
        return [self.positions + spread * (index % 3 - 1) for index in range(self.batch_size)]


@dataclasses.dataclass
class Simulated:
    """What one forward and backward pass would do. Bytes are beyond the weights; kept: at the end of the forward."""

    num_tokens: int
    forward_kernels: int
    backward_kernels: int
    forward_waits: list[str]
    backward_waits: list[str]
    computed_on_cpu: dict[str, int]
    attention: dict[str, int]
    kept_bytes: int
    peak_bytes: int
    work: dict[tuple[str, str], Work]
    estimated_bytes: int
    num_trainable: int

    @property
    def kernels(self) -> int:
        return self.forward_kernels + self.backward_kernels

    @property
    def kernel_seconds(self) -> float:
        return sum(work.seconds for work in self.work.values())

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / max(self.kernel_seconds, SECONDS_PER_LAUNCH * self.kernels)


def simulate(setting: Setting, *, change: Callable[[torch.nn.Module], None] | None = None) -> Simulated:
    """Simulate one micro-batch's forward and backward pass.

    Args:
        change: what to do to the HiggsAudioModel before the step, to break it on purpose.
    """
    config = released_model_config()
    if setting.layers is not None:
        config.text_config.num_hidden_layers = setting.layers
        config.audio_dual_ffn_layers = list(range(setting.layers))
    batch = make_batch(config, [SampleShape.of_length(length) for length in setting.lengths()])
    with simulated_cuda() as mode:
        peft_model = _build_model(config, setting, mode)
        if change is not None:
            change(unwrap(peft_model))
        loss_function, estimated = _build_step(setting, peft_model, batch, mode)
        account = mode.account
        account.forget_work()
        before = account.alive
        with mode:
            loss = loss_function()
            forward = _summary(account)
            kept = account.alive - before
            loss.backward()
        whole = _summary(account)
    return Simulated(
        num_tokens=batch.num_tokens,
        forward_kernels=forward["kernels"],
        backward_kernels=whole["kernels"] - forward["kernels"],
        forward_waits=forward["waits"],
        backward_waits=whole["waits"][len(forward["waits"]) :],
        computed_on_cpu=whole["computed_on_cpu"],
        attention=whole["attention"],
        kept_bytes=kept,
        peak_bytes=account.peak - before,
        work=dict(account.work),
        estimated_bytes=estimated,
        num_trainable=count_parameters(peft_model)["trainable"],
    )


def _summary(account: Account) -> dict[str, Any]:
    return {
        "kernels": account.launches,
        "waits": list(account.waits),
        "computed_on_cpu": dict(account.computed_on_cpu),
        "attention": dict(account.attention),
    }


def _build_model(config, setting: Setting, mode: SimulatedCuda):
    with mode.real():
        peft_model = build_random_lora_model(
            config,
            dtype=torch.bfloat16,
            device=torch.device("meta"),
            dropout=setting.dropout,
            targets=setting.targets,
            whole=setting.whole,
        )
    if setting.kernels == "liger":
        simulated_liger.install()
    for module in peft_model.modules():
        _move_to_device(module)
    apply_patches(
        unwrap(peft_model),
        packed_rows=setting.step == "ours",
        kernels=setting.kernels,
        activation_checkpointing=setting.recompute,
    )
    for tensor in (*peft_model.parameters(), *peft_model.buffers()):
        mode.account.hold(tensor)
    return peft_model


def _move_to_device(module: torch.nn.Module) -> None:
    """Give a module that is on the meta device fake CUDA tensors."""

    def on_device(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    for name, weight in module.named_parameters(recurse=False):
        setattr(module, name, torch.nn.Parameter(on_device(weight), requires_grad=weight.requires_grad))
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = on_device(buffer)
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):  # the rotary embedding keeps its frequencies twice
            setattr(module, name, on_device(value))


def _build_step(setting: Setting, peft_model, batch: Batch, mode: SimulatedCuda) -> tuple[Callable, int]:
    """A function that gives the loss, and the estimate of what the step needs beyond its weights."""
    expanded = batch.model_inputs.expanded.each(mode.to_device)
    tensors = {name: mode.to_device(tensor) for name, tensor in batch.model_inputs.items()}
    inputs = ModelInputs(expanded=expanded, **tensors)
    module = StepModule(peft_model)
    with mode.real():
        targets = build_targets(batch, placeholder_ids=module.placeholder_ids)
    if setting.step == "plain":
        labels = Labels(mode.to_device(batch.labels.text), mode.to_device(batch.labels.audio))
        on_device = Batch(inputs, labels, batch.sample_ids, batch.num_tokens)
        return lambda: plain_loss(peft_model, on_device)[0], 0
    values = {name: getattr(targets, name) for name in (field.name for field in dataclasses.fields(Targets))}
    targets_on_device = Targets(
        **{name: mode.to_device(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    )
    scales = torch.empty(9, dtype=torch.float32, device="cuda")
    with mode.real():
        estimated = estimate_step(setting, peft_model, batch, targets)
    return lambda: module(inputs, targets_on_device, scales).loss, estimated


def estimate_step(setting: Setting, peft_model, batch: Batch, targets: Targets) -> int:
    """What `ds-higgs estimate` says of this step beyond weights, optimizer states and the framework's own memory."""
    longest = SampleShape.of_length(max(setting.lengths()))
    frames = sum(batch.model_inputs[name].shape[1] for name in ("audio_in_ids", "audio_out_ids"))
    shape = BatchShape(
        num_samples=setting.batch_size,
        positions=batch.num_tokens,
        longest=make_batch(unwrap(peft_model).config, [longest]).num_tokens,
        frames=frames,
        text_rows=len(targets.text_labels),
        audio_rows=len(targets.audio_frames),
    )
    counts = count_parameters(peft_model)
    policy = Policy(
        zero_stage=0,  # gradients are not reduced here
        checkpoint_every=setting.recompute,
        lora_dropout=setting.dropout,
        kernels=setting.kernels,
        lora_paths=frozenset(setting.targets),
        whole_paths=frozenset(TARGETS) & frozenset(setting.whole),
        trained_heads=counts["audio_head"] + counts["text_head"],
    )
    terms = estimate_memory(
        model_shape(unwrap(peft_model).config),
        shape,
        policy,
        frozen=counts["total"] - counts["trainable"],
        trainable=counts["trainable"],
    )
    return terms["activations"] + terms["working space"] + terms["gradients"]


def memory_rows(layers: int | None) -> list[dict[str, Any]]:
    """Simulated and estimated peak of every batch size, length and checkpointing policy."""
    rows = []
    for positions in POSITIONS:
        for batch_size in BATCH_SIZES:
            for recompute in CHECKPOINTING_CHOICES:
                found = simulate(Setting(batch_size, positions, recompute, layers))
                rows.append(_row(batch_size, positions, recompute, found))
                print(rows[-1], file=sys.stderr, flush=True)
                gc.collect()
    return rows


def _row(batch_size: int, positions: int, recompute: int | None, found: Simulated) -> dict[str, Any]:
    config = released_model_config()
    flops = 4 * active_parameters(config) * found.tokens_per_second
    return {
        "batch": batch_size,
        "positions": positions,
        "checkpointing": describe_checkpointing(recompute),
        "simulated_gib": found.peak_bytes / GIB,
        "estimated_gib": found.estimated_bytes / GIB,
        "estimated / simulated": found.estimated_bytes / found.peak_bytes,
        "kernels": found.kernels,
        "waits": len(found.forward_waits) + len(found.backward_waits),
        "predicted tokens/s": round(found.tokens_per_second),
        "predicted mfu": flops / PEAK_FLOPS["H200"],
    }


def operation_rows(setting: Setting) -> list[dict[str, Any]]:
    """Where the predicted time of a step goes: operations of all layers, and of what is outside them, longest first."""
    layers = released_model_config().text_config.num_hidden_layers
    two, three = (simulate(dataclasses.replace(setting, layers=number)).work for number in (2, 3))
    in_layer = {kind: work.plus(two.get(kind, Work()), -1) for kind, work in three.items()}
    outside = {kind: work.plus(in_layer.get(kind, Work()), -2) for kind, work in two.items()}
    found = [("layers", kind, Work().plus(work, layers)) for kind, work in in_layer.items()]
    found += [("outside", kind, work) for kind, work in outside.items()]
    total = sum(work.seconds for _, _, work in found)
    return [
        {
            "where": where,
            "operation": name.removeprefix("aten.").removesuffix(".default"),
            "shapes": shapes,
            "launches": work.launches,
            "bound by": "FLOPs" if work.flops / H200.flops * 1.001 >= work.seconds else "bytes",
            "ms": 1e3 * work.seconds,
            "share": work.seconds / total,
        }
        for where, (name, shapes), work in sorted(found, key=lambda one: -one[2].seconds)
        if work.launches
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="of the released model's 28")
    parser.add_argument("--operations", action="store_true", help="print where the time of a step goes, and no more")
    parser.add_argument("--batch-size", type=int, default=16, help="for --operations")
    parser.add_argument("--positions", type=int, default=500, help="for --operations")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/simulated_h200.json"))
    arguments = parser.parse_args()
    if arguments.operations:
        print_table(operation_rows(Setting(arguments.batch_size, arguments.positions)))
        return 0
    rows = memory_rows(arguments.layers)
    print_table(rows)
    write_json(arguments.output, {"run": describe_run(torch.device("cpu")), "rows": rows})
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # see simulated_cuda.py

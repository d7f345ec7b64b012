"""A training step at the released model's shapes on a simulated GPU, what it does, and how long that would take."""

from simulated_cuda import SimulatedCuda, simulated_cuda  # isort: skip  (before torch)

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import simulated_liger
import torch
from simulated_work import Account, Work
from workload import SampleShape, build_random_lora_model, make_batch, plain_loss

from ds_higgs.batch import Batch, Labels, ModelInputs
from ds_higgs.losses import Targets, build_targets
from ds_higgs.model.loading import released_model_config
from ds_higgs.model.lora import count_parameters, unwrap
from ds_higgs.model.parts import TARGETS
from ds_higgs.model.patches import apply_patches
from ds_higgs.sizing.activations import fullest_of_passes
from ds_higgs.sizing.inputs import BatchShape, Policy
from ds_higgs.sizing.shape import model_shape
from ds_higgs.training.step_module import StepModule

SECONDS_PER_LAUNCH = 5e-6
SECONDS_PER_COMPILED_CALL = 30e-6  # guards and launch of a function by torch.compile: 17 to 27 us measured on a CPU


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
    compiled: bool = False
    varlen: bool = False
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
    def tokens_per_second(self) -> float:
        return self.num_tokens / max(kernel_seconds(self.work), host_seconds(self.work))


def kernel_seconds(work: Mapping[tuple[str, str], Work]) -> float:
    return sum(one.seconds for one in work.values())


def host_seconds(work: Mapping[tuple[str, str], Work]) -> float:
    return sum(
        one.launches * (SECONDS_PER_COMPILED_CALL if name.startswith("compiled.") else SECONDS_PER_LAUNCH)
        for (name, _), one in work.items()
    )


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
        with _earlier_garbage_left(), mode:
            before = account.alive
            loss = loss_function()
            forward = _summary(account)
            gc.collect()
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


@contextmanager
def _earlier_garbage_left() -> Iterator[None]:
    """What was garbage before is not collected inside: it would count against what runs there."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
        compiled=setting.compiled,
        varlen=setting.varlen,
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
    """What `ds-higgs estimate` says of this step beyond the weights, before gradients are reduced."""
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
        checkpoint_every=setting.recompute,
        lora_dropout=setting.dropout,
        kernels=setting.kernels,
        fused=setting.compiled,
        varlen=setting.varlen,
        lora_paths=frozenset(setting.targets),
        whole_paths=frozenset(TARGETS) & frozenset(setting.whole),
        trained_heads=counts["audio_head"] + counts["text_head"],
    )
    model = model_shape(unwrap(peft_model).config)
    return fullest_of_passes(model, shape, policy, trainable=counts["trainable"]).total

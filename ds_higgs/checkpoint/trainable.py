"""The trainable tensors of a DeepSpeed engine by name: which they are, and how a checkpoint's differ from them."""

from collections.abc import Sequence

from ds_higgs.checkpoint.advice import OTHER_SETTINGS
from ds_higgs.checkpoint.deepspeed_parts import whole_parameters, zero_param_shapes
from ds_higgs.errors import UserError

NamedShapes = Sequence[tuple[str, Sequence[int]]]


def list_trainable(engine) -> list[tuple[str, list[int]]]:
    """Name and whole shape of every trainable tensor, in the order of the optimizer's groups.

    Its state carries no names: its content means something only together with this order.
    """
    if engine.zero_optimization():
        return zero_param_shapes(engine)
    return [(engine.param_names[weight], list(weight.shape)) for weight in whole_parameters(engine)]


def engine_precision(engine) -> str:
    """The precision of the weights in training, as the config names it."""
    if engine.bfloat16_enabled():
        return "bf16"
    return "fp16" if engine.fp16_enabled() else "fp32"


def check_same_trainable(*, saved: NamedShapes, current: NamedShapes, ordered: bool, where: str) -> None:
    """Compare a checkpoint's trainable tensors with the engine's.

    Args:
        ordered: whether their order counts too: it does where DeepSpeed reads the flat shards as they are.

    Raises:
        UserError: naming every tensor that is missing, unexpected or of another shape, or the first out of order.
    """
    saved_shapes = {name: list(shape) for name, shape in saved}
    current_shapes = {name: list(shape) for name, shape in current}
    problems = [f"{name} is trained now and is not in it" for name in current_shapes if name not in saved_shapes]
    problems += [f"{name} is in it and is not trained now" for name in saved_shapes if name not in current_shapes]
    problems += [
        f"{name} has shape {saved_shapes[name]} in it and {shape} now"
        for name, shape in current_shapes.items()
        if name in saved_shapes and saved_shapes[name] != shape
    ]
    if ordered and not problems:
        places = zip(saved_shapes, current_shapes, strict=True)
        problems = [f"{old} stands where {new} is now" for old, new in places if old != new][:1]
    if problems:
        title = f"{where} is of another set of trainable tensors (lora.rank, lora.targets, lora.modules_to_save):"
        raise UserError.from_problems(title, _shorten(problems), advice=OTHER_SETTINGS)


def _shorten(problems: list[str], most: int = 12) -> list[str]:
    if len(problems) <= most:
        return problems
    return [*problems[:most], f"and {len(problems) - most} more"]

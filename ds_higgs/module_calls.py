"""What runs at a call of a module: other code in its forward's place, with the hooks around it, or no hooks at all."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, a call of `module` runs `forward`."""
    own_forward = module.__dict__.get("forward")  # set where something else has wrapped this module's forward
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own_forward is not None:
            module.forward = own_forward


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """While open, nothing runs before or after the forward of `module` and of the modules in it."""
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    found = [(one, kind, vars(one)[kind]) for one in module.modules() for kind in kinds]
    for one, kind, _ in found:
        setattr(one, kind, OrderedDict())
    try:
        yield
    finally:
        for one, kind, hooks in found:
            setattr(one, kind, hooks)

"""Calls of a module without what was hung on it."""

import pytest
import torch
from torch import nn

from ds_higgs.module_calls import without_hooks


def test_hooks_are_off_inside_and_back_afterwards():
    calls: list[str] = []
    inner = nn.Linear(2, 2)
    module = nn.Sequential(inner)
    inner.register_forward_pre_hook(lambda *_: calls.append("before"))
    inner.register_forward_hook(lambda *_: calls.append("after"))
    removed = module.register_forward_hook(lambda *_: calls.append("outer"))
    with without_hooks(module):
        module(torch.zeros(1, 2))
    assert calls == []
    with pytest.raises(RuntimeError, match="shapes"), without_hooks(module):
        module(torch.zeros(1, 3))
    module(torch.zeros(1, 2))
    assert calls == ["before", "after", "outer"]
    removed.remove()
    module(torch.zeros(1, 2))
    assert calls == ["before", "after", "outer", "before", "after"]

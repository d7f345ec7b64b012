"""Simulates training steps, whole and broken on purpose, and prints what was counted as JSON; run as a script.

The simulated device has to be there before torch is, and a process that used it can only be left by `os._exit`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import simulate  # isort: skip  (before torch)

import json
import os
from collections.abc import Callable

import torch

from ds_higgs.model import packed_rows
from ds_higgs.training import step_module

BATCH_SIZE = 3
AUDIO_PATH = ("audio_ffn", "audio_norms", "audio_head", "audio_embeddings")
Change = Callable[[torch.nn.Module], None]


def after_layers(function: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Put `function` behind every decoder layer."""

    def change(model: torch.nn.Module) -> None:
        for layer in model.layers:
            layer.register_forward_hook(lambda layer, inputs, outputs: (function(outputs[0]), *outputs[1:]))

    return change


def wait_for_the_device(rows: torch.Tensor) -> torch.Tensor:
    torch.ones(2, dtype=torch.int64, device="cuda").nonzero()
    return rows


def compute_on_the_cpu(rows: torch.Tensor) -> torch.Tensor:
    torch.zeros(2).exp()
    return rows


def with_a_mask(model: torch.nn.Module) -> None:
    def attend(query, key, value):
        heads = [states.transpose(1, 2) for states in (query, key, value)]
        mask = torch.ones(heads[0].shape[2], heads[0].shape[2], dtype=torch.bool, device="cuda")
        return torch.nn.functional.scaled_dot_product_attention(*heads, mask, enable_gqa=True).transpose(1, 2)

    packed_rows.sdpa = attend


def in_fp32(model: torch.nn.Module) -> None:
    stock = packed_rows.sdpa
    packed_rows.sdpa = lambda *states: stock(*(one.float() for one in states)).to(states[0].dtype)


def expanded_by_the_model(model: torch.nn.Module) -> None:
    step_module.forward_label_free = lambda model, inputs: model(**inputs, use_cache=False)


VARIANTS: dict[str, dict] = {"compiled": {"compiled": True}, "varlen": {"compiled": True, "varlen": True}}
CHANGES: dict[str, Change | None] = {
    "whole": None,
    "another kernel": after_layers(lambda rows: rows * 2),
    "another tensor kept": after_layers(lambda rows: rows * rows),
    "a wait in the layers": after_layers(wait_for_the_device),
    "on the cpu": after_layers(compute_on_the_cpu),
    "on two devices": after_layers(lambda rows: rows + torch.ones(3072, dtype=rows.dtype)),
    # These stay, and are the last.
    "attention in fp32": in_fp32,
    "attention with a mask": with_a_mask,
    "expanded by the model": expanded_by_the_model,
}


def count(change: Change | None, **variant) -> dict:
    """Counts of a step, by layer where they grow with the layers; or the error that the device raised."""
    try:
        two, three = (
            simulate.simulate(simulate.Setting(layers=layers, batch_size=BATCH_SIZE, **variant), change=change)
            for layers in (2, 3)
        )
    except RuntimeError as error:
        return {"error": str(error)}
    return {
        "forward_kernels_per_layer": three.forward_kernels - two.forward_kernels,
        "backward_kernels_per_layer": three.backward_kernels - two.backward_kernels,
        "waits": three.forward_waits,
        "waits_per_layer": len(three.forward_waits) - len(two.forward_waits),
        "backward_waits": three.backward_waits,
        "computed_on_cpu": three.computed_on_cpu,
        "attention": three.attention,
        "kept_bytes_per_layer_and_position": (three.kept_bytes - two.kept_bytes) / three.num_tokens,
    }


def estimates() -> dict[str, float]:
    """The estimate over the simulated peak, of the smallest and the largest batch and every policy, in four layers.

    Of the variants, without recomputation, where most is kept.
    """
    settings = [
        simulate.Setting(batch_size, positions, recompute, layers=4, **variant)
        for variant in ({}, *VARIANTS.values())
        for batch_size, positions in ((2, 500), (16, 2000))
        for recompute in ((None,) if variant else simulate.CHECKPOINTING_CHOICES)
    ]
    return {str(setting): _ratio(setting) for setting in settings}


def estimates_of_whole_parts() -> dict[str, float]:
    """The same in all 28 layers, where parts are trained whole beside LoRA: their gradients are most of it."""
    settings = [
        simulate.Setting(batch_size, positions, recompute, whole=whole)
        for batch_size, positions, recompute, whole in (
            (2, 500, None, AUDIO_PATH),
            (16, 2000, 1, AUDIO_PATH),
            (8, 500, 2, ("attention",)),
            (2, 500, 1, ("attention", "text_ffn", "text_head")),
        )
    ]
    return {str(setting): _ratio(setting) for setting in settings}


def _ratio(setting: simulate.Setting) -> float:
    step = simulate.simulate(setting)
    return step.estimated_bytes / step.peak_bytes


def estimate_of_a_step_that_keeps_more() -> float:
    """The same where every layer keeps two tensors that the estimate does not know."""
    setting = simulate.Setting(2, 500, layers=4)
    step = simulate.simulate(setting, change=after_layers(lambda rows: rows * rows * rows))
    return step.estimated_bytes / step.peak_bytes


if __name__ == "__main__":
    if sys.argv[2:] == ["whole parts"]:
        found = {"estimates": estimates_of_whole_parts()}
    else:
        found = {
            "estimates": estimates(),
            "estimate of more": estimate_of_a_step_that_keeps_more(),
            "variants": {name: count(None, **variant) for name, variant in VARIANTS.items()},
            "steps": {name: count(change) for name, change in CHANGES.items()},
        }
    Path(sys.argv[1]).write_text(json.dumps(found))
    os._exit(0)

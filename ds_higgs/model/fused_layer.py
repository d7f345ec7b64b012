"""A packed layer whose products and attention are kernels of their own, with everything else fused between them.

Between two products, everything elementwise is one pass over the rows: the residual's sum, the norm and LoRA's dropout;
the rotary embedding and the way into the grid; the way out of it and dropout; SwiGLU and dropout. The same holds for
the gradients, which come through an adapter and through its base and are added up where they are used. What is kept for
the backward pass is what the products and attention need, and no mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from boson_multimodal.model.higgs_audio.modeling_higgs_audio import HiggsAudioDualFFNDecoderLayer
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from ds_higgs.model import fused_functions
from ds_higgs.model.fused_functions import Dropout, Norm
from ds_higgs.model.grouped_lora import Group, Onto, find_group, project
from ds_higgs.model.split_weights import is_split

PLACES = 7  # of dropout in a layer: both blocks of the first norm, attention's output, both of the second, both SwiGLUs
# Below, the host is what limits: a call of a compiled function takes it six launches' time (predicted, not measured).
LEAST_ROWS = 1400
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]


class Functions:
    """The functions of `fused_functions` that a layer calls, each as `decorate` makes it."""

    def __init__(self, decorate: Callable[[Callable], Callable]):
        self.norm_rows = decorate(fused_functions.norm_rows)
        self.norm_rows_backward = decorate(fused_functions.norm_rows_backward)
        self.swiglu = decorate(fused_functions.swiglu)
        self.swiglu_backward = decorate(fused_functions.swiglu_backward)
        self.spread = decorate(fused_functions.spread)
        self.spread_rotated = decorate(fused_functions.spread_rotated)
        self.collect = decorate(fused_functions.collect)
        self.collect_rotated_back = decorate(fused_functions.collect_rotated_back)
        self.collect_dropped = decorate(fused_functions.collect_dropped)
        self.collect_dropped_backward = decorate(fused_functions.collect_dropped_backward)


def compiled_functions() -> Functions:
    """Each one kernel, by torch.compile, for any number of rows."""
    return Functions(lambda function: torch.compile(function, fullgraph=True))


class Cells(NamedTuple):
    """Where rows belong, and the cells that attention works on.

    blocks: sizes of the text and of the audio block; row_of_cell: [cells] int64, the row of each of attention's cells,
    -1 in the padding; slot: [rows] int64, the cell of each row; rope: cosine and sine, [rows, head_dim] each.
    """

    blocks: tuple[int, int]
    row_of_cell: torch.Tensor
    slot: torch.Tensor
    rope: Pair


def can_fuse(layer: HiggsAudioDualFFNDecoderLayer) -> bool:
    """Whether the layer's norms are frozen and whole: no gradient of theirs is computed here."""
    weights = [norm.weight for norm in (*_first_norms(layer), *_second_norms(layer))]
    return not any(weight.requires_grad or is_split(weight) for weight in weights)


@dataclass(frozen=True)
class FusedLayer:
    """One forward of a layer.

    attend: query, key and value [cells, heads, head_dim] to the query's shape, causally within each sample.
    seeds: [PLACES, ...] of this forward's dropouts; None where nothing is dropped.
    """

    functions: Functions
    places: Cells
    attend: Attend
    seeds: torch.Tensor | None

    def __call__(self, layer: HiggsAudioDualFFNDecoderLayer, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] to [rows, hidden]."""
        attention, mlps = layer.self_attn, (layer.mlp, layer.audio_mlp)
        qkv = _Adapted.of(hidden, (attention.q_proj, attention.k_proj, attention.v_proj))
        settings = _NormSettings(self.functions, _first_norms(layer), self._dropouts((0, 1), qkv, qkv), joint=True)
        hidden, normed, dropped = _Norm.apply(hidden, None, self.places.blocks, settings)
        attended = self._attend(attention, qkv.project(normed, dropped))

        pairs = [_Adapted.of(hidden, (mlp.gate_proj, mlp.up_proj)) for mlp in mlps]
        settings = _NormSettings(self.functions, _second_norms(layer), self._dropouts((3, 4), *pairs), joint=False)
        total, text, audio, *rest = _Norm.apply(hidden, attended, self.places.blocks, settings)
        blocks = zip((0, self.places.blocks[0]), mlps, pairs, (text, audio), rest, (5, 6), strict=True)
        for start, mlp, pair, normed, dropped, place in blocks:
            total = self._add_down(total, start, mlp, pair.project(normed, dropped), place)
        return total

    def _attend(self, attention: LlamaAttention, states: Sequence[torch.Tensor]) -> torch.Tensor:
        query, key, value = (state.unflatten(-1, (-1, attention.head_dim)) for state in states)
        query, key = (_IntoCells.apply(one, self.places, self.functions, True) for one in (query, key))
        out = self.attend(query, key, _IntoCells.apply(value, self.places, self.functions, False)).flatten(1)
        projection = _Adapted.of(out, (attention.o_proj,))
        (dropout,) = self._dropouts((2,), projection)
        (attended,) = projection.project(*_FromCells.apply(out, self.places, self.functions, dropout))
        return attended

    def _add_down(
        self, total: torch.Tensor, start: int, mlp: LlamaMLP, gate_and_up: Sequence[torch.Tensor], place: int
    ) -> torch.Tensor:
        """`total`, from row `start` on with a feed-forward path's output added in place."""
        projection = _Adapted.of(gate_and_up[0], (mlp.down_proj,))
        (dropout,) = self._dropouts((place,), projection)
        active, dropped = _SwiGLU.apply(*gate_and_up, self.functions, dropout)
        if projection.group is not None:
            return projection.group.apply(active, dropped, Onto(total, start))[0]
        (down,) = project(active, projection.projections)
        total[start : start + len(down)] += down
        return total

    def _dropouts(self, places: Sequence[int], *adapted: "_Adapted") -> tuple[Dropout | None, ...]:
        """Of each place; None where nothing is dropped."""
        seeds = self.seeds
        return tuple(
            Dropout(seeds[place], one.rate) if seeds is not None and one.rate > 0 else None
            for place, one in zip(places, adapted, strict=True)
        )


class _Adapted(NamedTuple):
    """Projections of one input; group: as one operation, whose dropout comes before it."""

    projections: Sequence[nn.Module]
    group: Group | None

    @classmethod
    def of(cls, hidden: torch.Tensor, projections: Sequence[nn.Module]) -> "_Adapted":
        return cls(projections, find_group(hidden, projections))

    @property
    def rate(self) -> float:
        return 0.0 if self.group is None else self.group.dropout

    def project(self, hidden: torch.Tensor, dropped: torch.Tensor | None) -> Sequence[torch.Tensor]:
        return project(hidden, self.projections) if self.group is None else self.group.apply(hidden, dropped)


class _NormSettings(NamedTuple):
    """Of the text and the audio block; joint: whether the blocks are wanted as one tensor."""

    functions: Functions
    norms: tuple[Norm, Norm]
    dropouts: tuple[Dropout | None, ...]
    joint: bool


class _Norm(torch.autograd.Function):
    """hidden + added, its norm by block, and what dropout leaves of that (None for none).

    The sum may be added to in place.
    """

    @staticmethod
    def forward(ctx, hidden, added, blocks, settings):
        dropped = None if settings.dropouts == (None, None) else torch.empty_like(hidden)
        total, normed = hidden if added is None else torch.empty_like(hidden), torch.empty_like(hidden)
        passed_on = hidden if added is None else torch.empty_like(hidden)  # as `total`, which is kept, and not added to
        outputs = *((None, None) if added is None else (total, passed_on)), normed, dropped
        for norm, dropout, *parts in zip(
            settings.norms, settings.dropouts, *(_split(one, blocks) for one in (hidden, added, *outputs)), strict=True
        ):
            if len(parts[0]):
                settings.functions.norm_rows(*parts[:2], norm, dropout, *parts[2:])
        ctx.save_for_backward(total)
        ctx.blocks, ctx.settings, ctx.adds = blocks, settings, added is not None
        if settings.joint:
            return passed_on, normed, dropped
        return passed_on, *_split(normed, blocks), *_dropped_blocks(dropped, blocks, settings.dropouts)

    @staticmethod
    def backward(ctx, grad_total, *grads):
        (total,), blocks, settings = ctx.saved_tensors, ctx.blocks, ctx.settings
        normed, dropped = (_split(grad, blocks) for grad in grads) if settings.joint else (grads[:2], grads[2:])
        grad = torch.empty_like(total)
        of_blocks = zip(
            *(_split(grad_total, blocks), normed, dropped, _split(total, blocks)),
            *(settings.norms, settings.dropouts, _split(grad, blocks)),
            strict=True,
        )
        for arguments in of_blocks:
            if len(arguments[0]):
                settings.functions.norm_rows_backward(*arguments)
        return grad, grad if ctx.adds else None, None, None


class _IntoCells(torch.autograd.Function):
    """Rows [rows, heads, head_dim] to attention's cells, rotated or not; the padding takes the first row.

    No real query looks at the padding, so that no gradient comes back from it.
    """

    @staticmethod
    def forward(ctx, states, places, functions, rotated):
        ctx.places, ctx.functions, ctx.rotated = places, functions, rotated
        if rotated:
            return functions.spread_rotated(states, *places.rope, places.row_of_cell)
        return functions.spread(states, places.row_of_cell)

    @staticmethod
    def backward(ctx, grad):
        places, functions = ctx.places, ctx.functions
        if ctx.rotated:
            return functions.collect_rotated_back(grad, *places.rope, places.slot), None, None, None
        return functions.collect(grad, places.slot), None, None, None


class _FromCells(torch.autograd.Function):
    """Cells [cells, width] to rows, and what dropout leaves of them."""

    @staticmethod
    def forward(ctx, cells, places, functions, dropout):
        ctx.places, ctx.functions, ctx.dropout = places, functions, dropout
        return functions.collect_dropped(cells, places.slot, dropout)

    @staticmethod
    def backward(ctx, grad, grad_dropped):
        backward = ctx.functions.collect_dropped_backward
        return backward(grad, grad_dropped, ctx.places.row_of_cell, ctx.dropout), None, None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, and what dropout leaves of it; keeps gate and up alone."""

    @staticmethod
    def forward(ctx, gate, up, functions, dropout):
        ctx.save_for_backward(gate, up)
        ctx.functions, ctx.dropout = functions, dropout
        return functions.swiglu(gate, up, dropout)

    @staticmethod
    def backward(ctx, grad, grad_dropped):
        return *ctx.functions.swiglu_backward(grad, grad_dropped, *ctx.saved_tensors, ctx.dropout), None, None


def _split(rows: torch.Tensor | None, blocks: tuple[int, int]) -> tuple[torch.Tensor, ...] | tuple[None, None]:
    return (None, None) if rows is None else rows.split(blocks)


def _dropped_blocks(
    dropped: torch.Tensor | None, blocks: tuple[int, int], dropouts: tuple[Dropout | None, ...]
) -> list[torch.Tensor | None]:
    return [None if dropout is None else part for part, dropout in zip(_split(dropped, blocks), dropouts, strict=True)]


def _first_norms(layer: HiggsAudioDualFFNDecoderLayer) -> tuple[Norm, Norm]:
    return _norm(layer.input_layernorm), _norm(layer.audio_input_layernorm)


def _second_norms(layer: HiggsAudioDualFFNDecoderLayer) -> tuple[Norm, Norm]:
    return _norm(layer.post_attention_layernorm), _norm(layer.audio_post_attention_layernorm)


def _norm(norm: LlamaRMSNorm) -> Norm:
    return Norm(norm.weight, norm.variance_epsilon)

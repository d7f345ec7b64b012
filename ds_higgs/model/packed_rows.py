"""Runs the decoder layers on packed rows: text rows first, then audio rows, no padding, sorted once per forward.

The stock dual-FFN layer finds its text and audio rows by boolean masks, several times in every layer, each with a
device synchronisation; it normalises every position with both norms; and padding goes through every matrix product.
Here the rows are sorted once, with one synchronisation, into two contiguous blocks, so that every norm and
feed-forward path takes its own block as a slice. Only attention needs the order of the sequence: queries, keys and
values are laid out in a right-padded grid, where plain causal attention is right whatever side the batch was padded on,
and the kernels without a mask can be used.
"""

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from boson_multimodal.model.higgs_audio.modeling_higgs_audio import HiggsAudioDualFFNDecoderLayer
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaFlashAttention2, LlamaMLP

from ds_higgs.layout import RowOrder, order_rows
from ds_higgs.model.activation_checkpointing import is_checkpointed
from ds_higgs.model.attention import flash_attention_2, sdpa, varlen
from ds_higgs.model.expanded_forward import expanded_sequence
from ds_higgs.model.fused_functions import draw_seeds
from ds_higgs.model.fused_layer import PLACES, Cells, Functions, FusedLayer, can_fuse
from ds_higgs.model.grouped_lora import project
from ds_higgs.model.layer_kernels import LayerKernels, torch_kernels


@dataclass(frozen=True)
class PackedRows(RowOrder):
    """The order of a batch's rows, for every layer of one forward.

    rope: cosine and sine, [rows, head_dim] each, in the dtype of the hidden states.
    ends: [batch + 1] int32, where each sample's cells begin and the last one's end, if there is no padding; else None.
    cell_source: [cells] int64, the row that each cell takes: its own, or, in the padding, the first.
    seeds: [layers, ...] of the fused layers' dropouts; None where nothing is dropped.
    """

    rope: tuple[torch.Tensor, torch.Tensor]
    ends: torch.Tensor | None
    cell_source: torch.Tensor
    seeds: torch.Tensor | None = None

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The text block and the audio block of [rows, ...], as views."""
        text, audio = rows.split([self.num_text, self.num_audio])  # one gradient for both, unlike two slices
        return text, audio

    def to_cells(self, rows: torch.Tensor) -> torch.Tensor:
        """Lay [rows, heads, head_dim] out for attention, as [cells, heads, head_dim].

        The padding holds the first row: no real query looks that way, and nothing comes back from there.
        """
        return _Spread.apply(rows, self.cell_source, self.grid_slot)

    def from_cells(self, cells: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_cells`; the gradient is zero in the padding."""
        return _Gather.apply(cells, self.grid_slot)

    def attend(
        self, attention: LlamaAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Causal attention of each sample: query, key and value [cells, heads, head_dim] to the query's shape."""
        if self.ends is not None:
            return varlen(query, key, value, self.ends, self.grid_length)
        kernel = flash_attention_2 if isinstance(attention, LlamaFlashAttention2) else sdpa
        grids = (states.unflatten(0, (self.batch_size, self.grid_length)) for states in (query, key, value))
        return kernel(*grids).flatten(0, 1)


class _Scatter(torch.autograd.Function):
    """Row i to slot[i] of `size` rows, zeros elsewhere; `index_copy`'s own gradient would keep the rows."""

    @staticmethod
    def forward(ctx, rows, slot, size):
        ctx.save_for_backward(slot)
        return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, slot, rows)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _Spread(torch.autograd.Function):
    """Row source[i] to cell i; only cell slot[j] gives row j a gradient."""

    @staticmethod
    def forward(ctx, rows, source, slot):
        ctx.save_for_backward(slot)
        return rows.index_select(0, source)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    """Row slot[i] of the grid; slots differ, so its gradient needs no sums."""

    @staticmethod
    def forward(ctx, grid, slot):
        ctx.save_for_backward(slot)
        ctx.size = grid.shape[0]
        return grid.index_select(0, slot)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, *ctx.saved_tensors, grad), None


@dataclass(frozen=True)
class LayerParts:
    """What a packed layer is computed with."""

    kernels: LayerKernels = field(default_factory=torch_kernels)
    fused: Functions | None = None  # of layers that can be fused; the rest run by the others
    least_fused_rows: int = 0
    project: Callable[[torch.Tensor, Sequence[nn.Module]], list[torch.Tensor]] = project
    varlen: bool = False  # attention without padding, see `attention.varlen`


def enable_packed_rows(model: HiggsAudioModel, *, parts: LayerParts | None = None) -> None:
    """Make `model`'s training forward use packed rows, in place. To be called before activation checkpointing.

    The final hidden states are those of the stock forward up to rounding (another number of rows in the same matrix
    products), with zeros in the padding. Generation, and a forward that asks for attentions or hidden states, take the
    stock path.
    """
    assert can_pack_rows(model), "packed rows need both feed-forward paths in every layer"
    parts = LayerParts() if parts is None else parts
    for layer in model.layers:
        assert not is_checkpointed(layer), "enable packed rows before activation checkpointing"
        layer.forward = functools.partial(_layer_forward, layer, layer.forward, parts)
    model._update_causal_mask = types.MethodType(_keep_padding_mask, model)
    model._forward_core = types.MethodType(functools.partial(_forward_core, parts), model)


def can_pack_rows(model: HiggsAudioModel) -> bool:
    """Whether every decoder layer is a dual-FFN layer without shortcuts, audio attention or dropout, as released."""
    text = model.config.text_config
    return (text.attention_dropout, text.hidden_act) == (0, "silu") and all(
        isinstance(layer, HiggsAudioDualFFNDecoderLayer) and not layer.fast_forward and not layer.use_audio_attention
        for layer in model.layers
    )


def pack_rows(
    model: HiggsAudioModel,
    hidden_states: torch.Tensor,
    padding_mask: torch.Tensor,
    audio_mask: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    padded: bool = True,
) -> PackedRows:
    """The order of a batch's rows, from the collator where it made one, and their rotary embedding.

    Args:
        padded: whether attention works on a right-padded grid; else samples lie one after another.
    """
    order: RowOrder = expanded_sequence(model) or order_rows(padding_mask, audio_mask, position_ids)
    order, ends = (order, None) if padded else order.without_padding()
    cos, sin = model.rotary_emb(hidden_states, order.positions.unsqueeze(0))
    values = {field.name: getattr(order, field.name) for field in fields(RowOrder)}
    rope, cell_source = (cos.squeeze(0), sin.squeeze(0)), order.row_of_cell.clamp(min=0)
    return PackedRows(**values, rope=rope, ends=ends, cell_source=cell_source)


def _keep_padding_mask(
    model: HiggsAudioModel, attention_mask, input_tensor, cache_position, past_key_values, output_attentions
):
    """Stands in for HiggsAudioModel._update_causal_mask: `_forward_core` below wants the mask [batch, seq] itself."""
    if past_key_values is None and attention_mask.dim() == 2:
        return attention_mask
    return HiggsAudioModel._update_causal_mask(
        model, attention_mask, input_tensor, cache_position, past_key_values, output_attentions
    )


def _forward_core(
    parts: LayerParts, model: HiggsAudioModel, hidden_states: torch.Tensor, causal_mask: torch.Tensor, **kwargs
):
    """Stands in for HiggsAudioModel._forward_core; `causal_mask` is what `_keep_padding_mask` returned."""
    if kwargs["past_key_values"] is not None or kwargs["use_cache"]:
        return HiggsAudioModel._forward_core(model, hidden_states=hidden_states, causal_mask=causal_mask, **kwargs)
    if kwargs["output_attentions"] or kwargs["output_hidden_states"]:
        causal_mask = HiggsAudioModel._update_causal_mask(
            model, causal_mask, hidden_states, kwargs["cache_position"], None, kwargs["output_attentions"]
        )
        return HiggsAudioModel._forward_core(model, hidden_states=hidden_states, causal_mask=causal_mask, **kwargs)

    masks = causal_mask, kwargs["audio_discrete_codes_mask"]
    rows = pack_rows(model, hidden_states, *masks, kwargs["position_ids"], padded=not parts.varlen)
    if parts.fused is not None and model.training:
        rows = replace(rows, seeds=draw_seeds(len(model.layers), PLACES, device=hidden_states.device))
    flat = hidden_states.flatten(0, 1)
    packed = flat.index_select(0, rows.source)
    for layer in model.layers:
        (packed,) = layer(packed, packed_rows=rows)
    unpacked = _Scatter.apply(packed, rows.source, flat.shape[0])
    return unpacked.view_as(hidden_states), None, None


def _layer_forward(
    layer: HiggsAudioDualFFNDecoderLayer, stock_forward, parts: LayerParts, hidden_states, *args, **kwargs
):
    """Stands in for HiggsAudioDualFFNDecoderLayer.forward: packed rows where `packed_rows` is given, else the stock."""
    rows = kwargs.get("packed_rows")
    if rows is None:
        return stock_forward(hidden_states, *args, **kwargs)
    if parts.fused is not None and len(hidden_states) >= parts.least_fused_rows and can_fuse(layer):
        return (_fused_forward(layer, parts.fused, rows, hidden_states),)
    norm = parts.kernels.norm
    text, audio = rows.split(hidden_states)
    normed = torch.cat([norm(layer.input_layernorm, text), norm(layer.audio_input_layernorm, audio)])
    hidden_states = hidden_states + _attend(layer.self_attn, normed, rows, parts)
    text, audio = rows.split(hidden_states)
    text = _feed_forward(layer.mlp, norm(layer.post_attention_layernorm, text), parts)
    audio = _feed_forward(layer.audio_mlp, norm(layer.audio_post_attention_layernorm, audio), parts)
    return (hidden_states + torch.cat([text, audio]),)


def _fused_forward(
    layer: HiggsAudioDualFFNDecoderLayer, functions: Functions, rows: PackedRows, hidden: torch.Tensor
) -> torch.Tensor:
    attend = functools.partial(rows.attend, layer.self_attn)
    places = Cells((rows.num_text, rows.num_audio), rows.row_of_cell, rows.grid_slot, rows.rope)
    seeds = None if rows.seeds is None else rows.seeds[layer.self_attn.layer_idx]
    return FusedLayer(functions, places, attend, seeds)(layer, hidden)


def _feed_forward(mlp: LlamaMLP, hidden: torch.Tensor, parts: LayerParts) -> torch.Tensor:
    gate, up = parts.project(hidden, (mlp.gate_proj, mlp.up_proj))
    (down,) = parts.project(parts.kernels.swiglu(gate, up), (mlp.down_proj,))
    return down


def _attend(attention: LlamaAttention, hidden: torch.Tensor, rows: PackedRows, parts: LayerParts) -> torch.Tensor:
    """Causal self-attention of every sample: [rows, hidden] to [rows, hidden]."""
    states = parts.project(hidden, (attention.q_proj, attention.k_proj, attention.v_proj))
    query, key, value = (state.unflatten(-1, (-1, attention.head_dim)) for state in states)  # [rows, heads, head_dim]
    query, key = parts.kernels.rotate(query, key, *rows.rope)
    out = rows.attend(attention, *(rows.to_cells(states) for states in (query, key, value)))
    (projected,) = parts.project(rows.from_cells(out).flatten(1), (attention.o_proj,))
    return projected

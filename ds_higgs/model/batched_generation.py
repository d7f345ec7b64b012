"""Speech codes for several prompts at once: those that `generate_codes` gives one by one, in a fraction of the time.

boson's `generate` takes one prompt: of several, it would mask no padding in the past, and place all speech alike. Here
its loop runs over prompts padded on the left, with the model's own layers, and draws as boson's own sampler does.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel

from ds_higgs.batch import ModelInputs
from ds_higgs.model.batched_sampling import Streams
from ds_higgs.model.block_cache import BlockCache
from ds_higgs.model.generation import (
    GeneratedCodes,
    Sampling,
    evaluation_mode,
    generate_codes,
    read_stream,
    stream_length,
)
from ds_higgs.model.heads import deferred_heads
from ds_higgs.model.server_sampling import check_can_be_served


def generate_together(
    model: HiggsAudioModel,
    prompts: Sequence[ModelInputs],
    *,
    max_frames: int,
    sampling: Sampling,
    seeds: Sequence[int],
    stop: Callable[[], bool] = lambda: False,
) -> list[GeneratedCodes]:
    """`generate_codes` of every prompt with its seed: the same codes, but where rounding decides between two.

    flash_attention_2 knows no past of this kind: with it, the prompts are spoken one by one.

    Args:
        prompts: at least one; one sample each, that ends with <|audio_out_bos|>.
        stop: asked at every frame (one by one: before every prompt) whether to leave the rest; what is returned then is
            unfinished.
    """
    if model.config._attn_implementation == "flash_attention_2":
        unsaid = GeneratedCodes(torch.zeros((model.config.audio_num_codebooks, 0), dtype=torch.long), "length")
        return [
            unsaid if stop() else generate_codes(model, prompt, max_frames=max_frames, sampling=sampling, seed=seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    config, room = model.config, stream_length(model.config, max_frames) - 1
    if sampling.as_served:
        check_can_be_served(config)
    with torch.inference_mode(), evaluation_mode(model):
        past = _Past(model, join_prompts(prompts, pad_id=model.padding_idx).to(model.device), room=room)
        heard = [prompt["audio_out_ids"].to(model.device) for prompt in prompts]
        streams = Streams(config, sampling, heard, seeds=seeds, room=room)
        for _ in range(room):
            streams.draw(past.next_logits(streams.last))
            if streams.all_ended or stop():
                break
        spoken = zip(streams.spoken(), streams.ended, strict=True)
        return [_read(columns, config, max_frames, ended=ended) for columns, ended in spoken]


def _read(columns: torch.Tensor, config: HiggsAudioConfig, max_frames: int, *, ended: bool) -> GeneratedCodes:
    codes = read_stream(columns.clone().cpu(), config)
    return GeneratedCodes(codes=codes[:, :max_frames], stopped_by="eos" if ended else "length")


def join_prompts(prompts: Sequence[ModelInputs], *, pad_id: int) -> ModelInputs:
    """Several prompts of one sample each as one batch, padded on the left: all of them go on at the right."""
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    joined: dict[str, torch.Tensor] = {
        name: torch.cat([F.pad(one[name], (length - one[name].shape[1], 0), value=value) for one in prompts])
        for name, value in (("input_ids", pad_id), ("attention_mask", 0))
    }
    for kind in ("audio_in_ids", "audio_out_ids"):
        joined |= _join_segments(kind, [one for one in prompts if kind in one])
    for name in ("audio_features", "audio_feature_attention_mask"):
        if clips := [one[name] for one in prompts if name in one]:
            joined[name] = torch.cat(clips)  # of one length all: the tower hears 30 s
    return ModelInputs(expanded=None, **joined)


def _join_segments(kind: str, prompts: Sequence[ModelInputs]) -> dict[str, torch.Tensor]:
    """The codes of all segments one after another, and where each begins; nothing for no prompts."""
    if not prompts:
        return {}
    starts, frames = [], 0
    for prompt in prompts:
        starts.append(prompt[f"{kind}_start"] + frames)
        frames += prompt[kind].shape[1]
    return {kind: torch.cat([prompt[kind] for prompt in prompts], dim=1), f"{kind}_start": torch.cat(starts)}


class _Past:
    """What a model has read and said so far, row by row."""

    def __init__(self, model: HiggsAudioModel, prompts: ModelInputs, *, room: int):
        """Read `prompts`, without logits, as speech begins with BOS; there will be `room` columns after them."""
        self._model = model
        self._cache = BlockCache(room=room)
        with deferred_heads(model):
            read = model(**prompts, past_key_values=self._cache, use_cache=True, return_dict=True)
        batch, length = read.attention_mask.shape
        self._cache.filled = length
        padding = read.attention_mask == 0
        self._padding = padding.sum(dim=1, keepdim=True)  # [batch, 1]
        self._places = torch.arange(length + room, device=model.device)
        is_speech = read.audio_in_discrete_codes_mask | read.audio_out_mask
        self._is_audio = F.pad(is_speech, (0, room), value=True)  # [batch, length + room]
        # [batch, 1, 1, length + room], added to the scores; None where nothing is padded, as the model itself has it
        mask = torch.zeros((batch, 1, 1, length + room), dtype=model.dtype, device=model.device)
        mask[:, 0, 0, :length].masked_fill_(padding, torch.finfo(model.dtype).min)
        self._mask = mask if padding.any() else None

    def next_logits(self, columns: torch.Tensor) -> torch.Tensor:
        """Hear a column more of every row, [codebooks, batch], and predict the next: [batch, codebooks, codes] fp32."""
        model, config = self._model, self._model.config
        place, end = self._cache.filled, self._cache.filled + 1
        hidden, *_ = model._forward_core(
            hidden_states=model._embed_audio_ids(columns).unsqueeze(1),
            causal_mask=None if self._mask is None else self._mask[..., :end],
            position_ids=-self._padding,  # the model adds the place in the cache, padding included
            cache_position=self._places[place:end],
            audio_discrete_codes_mask=self._is_audio[:, :end],
            past_key_values=self._cache,
            use_cache=True,
            # of StaticCache and captured graphs alone
            audio_attention_mask=None,
            fast_forward_attention_mask=None,
            output_attentions=False,
            output_hidden_states=False,
        )
        self._cache.filled = end
        logits = model.audio_decoder_proj.audio_lm_head(model.norm(hidden[:, 0]))
        return logits.view(-1, config.audio_num_codebooks, model.audio_codebook_size).float()

"""Which weights a run trains: LoRA's, those of the audio path, all that the base uses, or some of them."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import PeftModel

from ds_higgs.errors import UserError
from ds_higgs.model.lora import apply_lora
from ds_higgs.model.parts import is_used
from ds_higgs.model.split_weights import whole_shape

TrainMode = Literal["lora", "audio_path", "full"]

# Weights that no text position passes through: the text path's logits on text stay the base's to the bit.
_AUDIO_PATH = re.compile(
    r"layers\.\d+\.audio_.*|audio_decoder_proj\.audio_lm_head\..*|audio_codebook_embeddings\..*"
    r"|audio_out_embed_projector\..*"
)


def make_trainable(
    model: HiggsAudioModel, *, mode: TrainMode, only: str | None, lora: Mapping[str, Any]
) -> PeftModel | HiggsAudioModel:
    """Put LoRA on `model`, or thaw the weights that `mode` trains, in place; everything else is frozen.

    Args:
        only: for audio_path and full: an expression that whole names of weights have to match.
        lora: for lora: the arguments of `apply_lora`.

    Raises:
        UserError: for expressions that match nothing, and for a base without what is to be trained.
    """
    if mode == "lora":
        return apply_lora(model, **lora)
    chosen = set(select_weights(model, mode=mode, only=only))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return model


def select_weights(model: HiggsAudioModel, *, mode: TrainMode, only: str | None = None) -> list[str]:
    """Names of the weights that `mode`, which is audio_path or full, trains of a model as it was loaded.

    Left out is what the base never uses, which weight decay alone would change, and what it holds fixed, such as the
    Whisper tower's positions.

    Raises:
        UserError: there are none.
    """
    used = [name for name, parameter in model.named_parameters() if parameter.requires_grad and is_used(model, name)]
    found = [name for name in used if mode == "full" or _AUDIO_PATH.fullmatch(name)]
    if not found:
        raise UserError(f"train.mode: {mode}: this base has no such weights")
    if only is None:
        return found
    if not (chosen := [name for name in found if re.fullmatch(only, name)]):
        raise UserError(
            f"train.only: no whole name of a weight that {mode} trains matches {only!r}; names look like "
            "layers.0.audio_mlp.up_proj.weight, audio_decoder_proj.audio_lm_head.weight"
        )
    return chosen


def trained_shapes(model: PeftModel | HiggsAudioModel) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every weight that is trained, also where ZeRO-3 has split it."""
    return {name: whole_shape(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}

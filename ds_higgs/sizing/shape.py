"""Sizes and parameter counts of a base model in training, from its config alone: nothing is loaded."""

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import nn

from ds_higgs.model.loading import HiggsAudioConfig, build_meta_model
from ds_higgs.model.lora import count_parameters
from ds_higgs.model.trained import TrainMode, make_trainable
from ds_higgs.model.whole_modules import release_originals
from ds_higgs.sizing.inputs import ModelShape


def model_shape(config: HiggsAudioConfig) -> ModelShape:
    """What memory depends on."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelShape(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        num_layers=text.num_hidden_layers,
        query_width=text.num_attention_heads * head_dim,
        key_width=text.num_key_value_heads * head_dim,
        num_heads=text.num_attention_heads,
        text_vocab=text.vocab_size,
        audio_vocab=config.audio_num_codebooks * (config.audio_codebook_size + 2),
    )


def count_trained_parameters(
    config: HiggsAudioConfig, *, mode: TrainMode, only: str | None, lora: Mapping[str, Any], keeps_base: bool = False
) -> dict[str, int]:
    """`lora.count_parameters` of a model on the meta device, and two more.

    `quantizable` is what 4-bit quantization would pack, `largest` the largest of the trained tensors.

    Args:
        mode, only, lora: see `trained.make_trainable`.
        keeps_base: the base's own weights stay beside what is trained whole with LoRA.

    Raises:
        UserError: for LoRA targets, or weights to train, that are not in this model.
    """
    model = build_meta_model(config)
    quantizable = sum(module.weight.numel() for module in model.layers.modules() if isinstance(module, nn.Linear))
    trained = make_trainable(model, mode=mode, only=only, lora=lora)
    if isinstance(trained, PeftModel) and not keeps_base:
        release_originals(trained)
    largest = max(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    return {**count_parameters(trained), "quantizable": quantizable, "largest": largest}

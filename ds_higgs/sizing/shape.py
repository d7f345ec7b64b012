"""Sizes and parameter counts of a base model with LoRA, from its config alone: nothing is loaded."""

from collections.abc import Sequence

from torch import nn

from ds_higgs.model.loading import HiggsAudioConfig, build_meta_model
from ds_higgs.model.lora import apply_lora, count_parameters
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


def count_lora_parameters(
    config: HiggsAudioConfig, *, rank: int, targets: Sequence[str] | str, modules_to_save: Sequence[str], dora: bool
) -> dict[str, int]:
    """`lora.count_parameters` of a model on the meta device, and `quantizable`: what 4-bit quantization would pack.

    Raises:
        UserError: for targets that are not in this model.
    """
    model = build_meta_model(config)
    quantizable = sum(module.weight.numel() for module in model.layers.modules() if isinstance(module, nn.Linear))
    peft_model = apply_lora(
        model, rank=rank, alpha=rank, dropout=0.0, targets=targets, modules_to_save=modules_to_save, dora=dora
    )
    return {**count_parameters(peft_model), "quantizable": quantizable}

"""A random Higgs Audio model with LoRA, voice-cloning batches of chosen lengths, and the plain step to compare with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel

from ds_higgs.batch import IGNORE_INDEX, Batch
from ds_higgs.data.collation import BatchCollator
from ds_higgs.layout import AudioLayout
from ds_higgs.model.fp8 import use_fp8
from ds_higgs.model.loading import released_model_config
from ds_higgs.model.lora import apply_lora, unwrap
from ds_higgs.model.whole_modules import release_originals
from ds_higgs.sizing import flops
from ds_higgs.sizing.shape import model_shape

ALL_TARGETS = ("attention", "text_ffn", "audio_ffn")


@dataclass(frozen=True)
class SampleShape:
    """Text tokens and 40 ms frames of a voice-cloning sample; only the assistant's text and frames are learned."""

    prompt_tokens: int
    reference_frames: int
    answer_tokens: int
    target_frames: int

    @classmethod
    def of_length(cls, positions: int) -> "SampleShape":
        """About `positions` positions: a quarter text, 6 in 10 of it prompt; the rest audio, 4 in 10 reference."""
        audio = round(0.75 * positions) - 2 * 9  # each segment gains 2 specials and 7 frames by the delay pattern
        text = positions - round(0.75 * positions)
        return cls(
            prompt_tokens=round(0.6 * text),
            reference_frames=round(0.4 * audio),
            answer_tokens=text - round(0.6 * text),
            target_frames=audio - round(0.4 * audio),
        )


def small_config(*, hidden_size: int, num_layers: int, vocab_size: int = 128256) -> HiggsAudioConfig:
    """The released config with other sizes; heads of 64."""
    config = released_model_config()
    text = config.text_config
    text.hidden_size, text.intermediate_size = hidden_size, hidden_size * 8 // 3
    text.num_hidden_layers, text.vocab_size = num_layers, vocab_size
    text.head_dim, text.num_attention_heads = 64, hidden_size // 64
    text.num_key_value_heads = max(1, hidden_size // 128)
    config.audio_dual_ffn_layers = list(range(num_layers))
    if vocab_size < config.text_config.vocab_size or vocab_size < 128017:
        config.audio_in_token_idx, config.audio_out_token_idx = vocab_size - 2, vocab_size - 1
        config.pad_token_id = text.pad_token_id = vocab_size - 3
        text.bos_token_id = text.eos_token_id = vocab_size - 3
    return config


def build_random_lora_model(
    config: HiggsAudioConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rank: int = 16,
    dropout: float = 0.0,
    attention: str = "sdpa",
    targets: Sequence[str] = ALL_TARGETS,
    whole: Sequence[str] = (),
    quantization: str | None = None,
):
    """Random weights made on `device`; LoRA B is not zero, so that LoRA A has gradients from the first step.

    whole: parts that are trained whole; the base's own are let go of.
    """
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = HiggsAudioModel._from_config(config, attn_implementation=attention, torch_dtype=dtype).train()
    finally:
        torch.set_default_dtype(default)
    if quantization is not None:
        {"fp8": use_fp8, "nf4": _use_nf4}[quantization](model)
    lora = {"rank": rank, "alpha": 2 * rank, "dropout": dropout}
    peft_model = apply_lora(model, **lora, targets=targets, modules_to_save=whole)
    release_originals(peft_model)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return peft_model


def _use_nf4(model: HiggsAudioModel) -> None:
    """What `from_pretrained` does for `model.quantization: nf4`, of weights that are there already."""
    import bitsandbytes as bnb

    settings = {"compute_dtype": torch.bfloat16, "quant_type": "nf4", "compress_statistics": True}
    for parent in [module for layer in model.layers for module in layer.modules()]:
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                packed = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, device="meta", **settings)
                packed.weight = bnb.nn.Params4bit(
                    child.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                setattr(parent, name, packed.to(child.weight.device))


def make_batch(config: HiggsAudioConfig, shapes: Sequence[SampleShape], *, seed: int = 0) -> Batch:
    """A micro-batch as training collates it, with random tokens and codes."""
    generator = torch.Generator().manual_seed(seed)
    collate = BatchCollator(AudioLayout.from_config(config))
    samples = [make_sample(config, shape, generator) for shape in shapes]
    return collate(samples, [f"random:{index}" for index in range(len(shapes))])


def make_sample(config: HiggsAudioConfig, shape: SampleShape, generator: torch.Generator) -> ChatMLDatasetSample:
    """A sample of random tokens and codes, as data sets give it."""
    num_words = min(config.pad_token_id, config.audio_in_token_idx)

    def words(count: int) -> torch.Tensor:
        return torch.randint(0, num_words, (count,), generator=generator)

    frames = shape.reference_frames + shape.target_frames
    answer = torch.cat([words(shape.answer_tokens), torch.tensor([config.audio_out_token_idx]), words(2)])
    prompt = torch.cat([words(shape.prompt_tokens), torch.tensor([config.audio_in_token_idx])])
    return ChatMLDatasetSample(
        input_ids=torch.cat([prompt, answer]),
        label_ids=torch.cat([torch.full_like(prompt, IGNORE_INDEX), answer]),
        audio_ids_concat=torch.randint(0, 1024, (config.audio_num_codebooks, frames), generator=generator),
        audio_ids_start=torch.tensor([0, shape.reference_frames]),
        audio_waveforms_concat=torch.tensor([]),
        audio_waveforms_start=torch.tensor([]),
        audio_sample_rate=torch.tensor([]),
        audio_speaker_indices=torch.tensor([]),
    )


def plain_loss(peft_model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses as public Higgs Audio trainers compute them: full text logits, a loop over the codebooks.

    Returns:
        The loss, and [1 + codebooks] losses (text, then each codebook), detached.
    """
    outputs = unwrap(peft_model)(**batch.model_inputs, label_ids=batch.labels.text, use_cache=False)
    logits = outputs.logits[:, :-1].float()
    labels = outputs.expanded_labels[:, 1:]
    text = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORE_INDEX)
    codebooks = [
        F.cross_entropy(outputs.audio_logits[:-1, index], batch.labels.audio[index, 1:], ignore_index=IGNORE_INDEX)
        for index in range(batch.labels.audio.shape[0])
    ]
    loss = text + sum(codebooks) / len(codebooks)
    return loss, torch.stack([text, *codebooks]).detach()


def active_parameters(config: HiggsAudioConfig) -> int:
    """Weights of the layers that a position passes: attention and one of the two feed-forward paths."""
    return flops.active_parameters(model_shape(config))

"""Folders shaped like the released ones: their classes, file names and config layout; small sizes, random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import HubertConfig, HubertModel, PreTrainedTokenizerFast

import ds_higgs.model.loading
from ds_higgs.data.codec.higgs import SEMANTIC_FOLDER
from ds_higgs.data.codec.torchaudio_stand_in import provide_torchaudio
from ds_higgs.model.tiny_tokenizer import SPECIAL_TOKENS

FIRST_SPECIAL = 128_000
NUM_SPECIAL = 256
HIDDEN = 64
LAYERS = 2


def write_released_shape(folder: Path) -> None:
    """As `ds-higgs download --out` makes it: the base in shards with its tokenizer, and the codec in `codec/`."""
    _write_base(folder)
    _llama_tokenizer().save_pretrained(folder)
    write_higgs_codec(folder / "codec")


def write_higgs_codec(folder: Path) -> None:
    """Boson's real tokenizer class, its HuBERT small and all weights random, saved as the released one is."""
    provide_torchaudio()
    tokenizer_module = pytest.importorskip("boson_multimodal.audio_processing.higgs_audio_tokenizer")
    config = {"D": 256, "ratios": [8, 5, 4, 2, 3], "sample_rate": 24000, "bins": 1024, "n_q": 8,
              "target_bandwidths": [0.5, 1, 1.5, 2], "semantic_techer": "hubert_base_general"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(tokenizer_module.AutoModel, "from_pretrained", _small_hubert)
        tokenizer = tokenizer_module.HiggsAudioTokenizer(**config, device="cpu")
        _spread_codebooks(tokenizer.eval())
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tokenizer.state_dict(), folder / "model.pth")
    tokenizer.semantic_model.save_pretrained(folder / SEMANTIC_FOLDER)


def _write_base(folder: Path) -> None:
    """The released config.json with other sizes, weights in bf16 shards with their index."""
    released = Path(ds_higgs.model.loading.__file__).with_name("released_config.json")
    values: dict[str, Any] = json.loads(released.read_text())
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HIDDEN // 4}
    values["text_config"] |= sizes | heads
    values["audio_dual_ffn_layers"] = [*range(LAYERS)]
    values |= {"audio_ffn_hidden_size": HIDDEN, "audio_ffn_intermediate_size": 2 * HIDDEN}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HiggsAudioModel(HiggsAudioConfig.from_dict(values)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20MB")
    (folder / "config.json").write_text(json.dumps(values, indent=2))


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3's: 128,000 entries of byte-level BPE (here bytes and fillers), then 256 special tokens."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"filler_{number}" for number in range(FIRST_SPECIAL - len(names))]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rest = [f"<|reserved_special_token_{number}|>" for number in range(3, NUM_SPECIAL - len(SPECIAL_TOKENS) + 3)]
    special = [*SPECIAL_TOKENS, *rest]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        clean_up_tokenization_spaces=True,
        model_max_length=131072,
    )


def _small_hubert(*_: Any, **__: Any) -> HubertModel:
    return HubertModel(
        HubertConfig(num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, conv_dim=(16,) * 7)
    )


@torch.no_grad()
def _spread_codebooks(tokenizer: Any) -> None:
    """Codebooks about what the random encoder gives; as built they are all zero, and all codes equal."""
    encoded = []
    hook = tokenizer.fc_prior.register_forward_hook(lambda _, __, output: encoded.append(output[0]))
    time = np.arange(2 * 24_000) / 24_000
    noise = np.random.default_rng(0).normal(scale=0.05, size=len(time))
    tokenizer.encode((0.3 * np.sin(2 * np.pi * 150 * time) + noise).astype(np.float32), sr=24_000)
    hook.remove()
    mean, std = encoded[0].mean(0), encoded[0].std(0)
    for number, layer in enumerate(tokenizer.quantizer.vq.layers):
        embed = layer._codebook.embed
        embed.copy_(std * torch.randn(embed.shape) + (mean if number == 0 else 0))

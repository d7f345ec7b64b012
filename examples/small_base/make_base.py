"""Make the small base before it has learned anything: tokenizer, config.json, random weights, and its codec.

python examples/small_base/make_base.py --codec outputs/small_base/codec --out outputs/small_base/random
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from speech import LANGUAGES, WORDS, written

from ds_higgs.data.prompt_forms import SERVED_SYSTEM_MESSAGE
from ds_higgs.model.tiny import CODEC_FOLDER, build_tiny_config
from ds_higgs.model.tiny_tokenizer import build_tiny_tokenizer

MAX_VOCABULARY = 2048  # enough for every word of the corpus to be one token
SIZES = {
    "hidden_size": 192,
    "num_layers": 5,
    "intermediate_size": 512,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}


def tokenizer_corpus() -> list[str]:
    """The vocabulary, each word at the start and inside of a sentence, and what stands around it in a prompt."""
    words = [written(word) for language in LANGUAGES for kind in WORDS[language].values() for word in kind]
    return [SERVED_SYSTEM_MESSAGE, "system", "user", "assistant", *words, *(f" {word}" for word in words)]


def write_base(folder: Path, codec: Path, *, seed: int) -> None:
    """Write a base of random weights that reads the vocabulary and speaks the codes of `codec` to a new folder."""
    codebook_size = json.loads((codec / "config.json").read_text(encoding="utf-8"))["codebook_size"]
    tokenizer = build_tiny_tokenizer(tokenizer_corpus(), vocab_size=MAX_VOCABULARY)
    config = build_tiny_config(tokenizer, whisper=False, codebook_size=codebook_size, **SIZES)
    torch.manual_seed(seed)
    model = HiggsAudioModel(config)
    print(f"{len(tokenizer)} text tokens, {sum(weight.numel() for weight in model.parameters()):,} weights")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copytree(codec, folder / CODEC_FOLDER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", type=Path, required=True, help="folder that learn_codec.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the base")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_base(options.out, options.codec, seed=options.seed)


if __name__ == "__main__":
    main()

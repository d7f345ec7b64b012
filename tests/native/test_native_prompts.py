"""Our prompt in the form boson is that of transformers' HiggsAudioV2Processor, and, by its rules, of vLLM-Omni."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ds_higgs.adapters.native_processor import CHAT_TEMPLATE, chat_template
from ds_higgs.data.codec.opening import find_codec
from ds_higgs.data.collation import BatchCollator
from ds_higgs.data.prompt_forms import SERVED_SYSTEM_MESSAGE
from ds_higgs.data.prompts import build_voice_prompt, collate_prompt
from ds_higgs.data.rules import build_rules
from ds_higgs.model.loading import load_tokenizer, read_model_config
from tests.support.conversations import CONVERSATIONS

PYTHON = os.environ.get("DS_HIGGS_NATIVE_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="DS_HIGGS_NATIVE_PYTHON names no environment")
HERE = Path(__file__).parent

# vLLM-Omni (higgs_audio_v2_tokenizer.py, November 2026) renders the same conversation under this system message alone,
# and puts the reference in place of its placeholder together with the two marks around it, which so stand twice.
VLLM_OMNI_SYSTEM = "Generate audio following instruction."
VLLM_OMNI_MARKS_TWICE = ("<|audio_out_bos|>", "<|audio_eos|>")


def test_the_prompts_are_those_of_the_processor(tiny_base: Path, example_dir: Path, tmp_path: Path):
    rules = build_rules(
        tokenizer=load_tokenizer(tiny_base),
        model_config=read_model_config(tiny_base),
        codec=find_codec(None, tiny_base),
    )
    asked = [(text, said, system or SERVED_SYSTEM_MESSAGE) for text, said, system in CONVERSATIONS]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    (tmp_path / CHAT_TEMPLATE).write_text(chat_template())
    audio = example_dir / "audio" / "speaker_001_00.flac"
    files = [tiny_base, audio, tmp_path / "asked.json", tmp_path / CHAT_TEMPLATE, tmp_path / "found.json"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([str(PYTHON), str(HERE / "prompts.py"), *map(str, files)], check=True, env=environment)
    found = json.loads((tmp_path / "found.json").read_text())
    codes = torch.tensor(found["codes"])
    for (text, said, system), theirs in zip(asked, found["prompts"], strict=True):
        prompt = build_voice_prompt(
            text,
            reference_text=said,
            reference_codes=None if said is None else codes,
            form="boson",
            system=system,
            tokenizer=rules.tokenizer,
            layout=rules.layout,
        )
        ours = collate_prompt(prompt, BatchCollator(rules.layout))
        columns = ours["audio_out_ids"].t().tolist()
        assert columns == theirs["columns"]
        delay = rules.tokenizer.convert_tokens_to_ids("<|audio_out_bos|>") + 1
        expanded = expand(ours["input_ids"][0].tolist(), rules.layout.audio_out_token, len(columns), delay)
        assert expanded == theirs["input_ids"]
        if said is not None and system == VLLM_OMNI_SYSTEM:
            marks = rules.tokenizer.convert_tokens_to_ids(list(VLLM_OMNI_MARKS_TWICE))
            assert (
                once(by_rules_of_vllm_omni(ours["input_ids"][0].tolist(), rules, len(columns), delay), marks)
                == expanded
            )


def expand(tokens: Sequence[int], placeholder: int, columns: int, delay: int) -> list[int]:
    """The placeholder as the processor writes it: one a column, the last seven of them delay tokens."""
    expanded: list[int] = []
    for token in tokens:
        expanded += [placeholder] * (columns - 7) + [delay] * 7 if token == placeholder else [token]
    return expanded


def by_rules_of_vllm_omni(tokens: Sequence[int], rules, columns: int, delay: int) -> list[int]:
    bos, eos = rules.tokenizer.convert_tokens_to_ids(list(VLLM_OMNI_MARKS_TWICE))
    block = [bos, *expand([rules.layout.audio_out_token], rules.layout.audio_out_token, columns, delay), eos]
    return [one for token in tokens for one in (block if token == rules.layout.audio_out_token else [token])]


def once(tokens: Sequence[int], marks: Sequence[int]) -> list[int]:
    """Without the second of two equal marks side by side."""
    return [
        token for place, token in enumerate(tokens) if not (place and token in marks and tokens[place - 1] == token)
    ]

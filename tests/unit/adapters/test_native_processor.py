"""The chat template beside a native export, whoever renders it: prompts that are ours, token by token."""

import json

import jinja2
import pytest

from ds_higgs.adapters.native_processor import NATIVE_CODEC, chat_template, save_native_processor
from ds_higgs.data.prompt_forms import SERVED_SYSTEM_MESSAGE, VoiceRequest, write_sample
from ds_higgs.model.loading import load_tokenizer, read_model_config
from tests.support.conversations import CONVERSATIONS, QUIET_ROOM

AUDIO = {"type": "audio"}


def render(messages) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    template = environment.from_string(chat_template())
    return template.render(messages=messages, bos_token="<|begin_of_text|>", add_generation_prompt=True)


@pytest.mark.parametrize("plain", [True, False], ids=["strings", "items"])
@pytest.mark.parametrize(("text", "said", "system"), CONVERSATIONS)
def test_it_renders_the_served_form(text, said, system, plain):
    def content(words):
        return words if plain else [{"type": "text", "text": words}]

    request = VoiceRequest(text, target=AUDIO, reference=None if said is None else AUDIO, reference_text=said)
    sample = write_sample(request, "boson", system=system)
    words = [
        "".join(item["text"] for item in message["content"])
        if isinstance(message["content"], list) and message["content"][0]["type"] == "text"
        else message["content"]
        for message in sample["messages"][:-1]
    ]
    messages = [
        {"role": message["role"], "content": content(said) if isinstance(said, str) else said}
        for message, said in zip(sample["messages"], words, strict=False)
    ]
    parts = [
        f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n"
        + (said if isinstance(said, str) else "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>")
        + "<|eot_id|>"
        for message, said in zip(sample["messages"], words, strict=False)
    ]
    start = "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>"
    assert render(messages) == "<|begin_of_text|>" + "".join(parts) + start


def test_a_scene_of_its_own_stands_in_the_system_turn():
    system, user = {"role": "system", "content": SERVED_SYSTEM_MESSAGE}, {"role": "user", "content": "Hi."}
    scene = {"role": "scene", "content": [{"type": "text", "text": "Audio is recorded from a quiet room."}]}
    assert render([system, scene, user]) == render([{**system, "content": QUIET_ROOM}, user])


def test_without_a_codec_of_transformers_it_points_to_the_released_one(tiny_base, tmp_path):
    save_native_processor(tmp_path, tokenizer=load_tokenizer(tiny_base), config=read_model_config(tiny_base))
    written = json.loads((tmp_path / "processor_config.json").read_text())
    pointer = {"audio_tokenizer_class": "HiggsAudioV2TokenizerModel", "audio_tokenizer_name_or_path": NATIVE_CODEC}
    assert written["audio_tokenizer"] == pointer
    assert not (tmp_path / "codec").exists()

"""Checking one sample: what is accepted, and the message for each thing that is wrong."""

import pytest
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample

from ds_higgs.data.chatml import parse_sample, tokenize
from ds_higgs.data.problems import BadSampleError
from ds_higgs.layout import AudioLayout
from ds_higgs.model.loading import load_tokenizer, read_model_config

from .audio_files import cloning_sample, text_sample

AUDIO = {"type": "audio", "audio_url": "a.wav"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def broken(**changes):
    return {**cloning_sample("a.wav", "b.wav"), **changes}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ([], "the sample is an empty list"),
        (None, "the sample is missing or null"),
        ({}, "`messages` is missing"),
        ({"messages": []}, "`messages` is an empty list"),
        ({"messages": [3]}, r"messages\[0\] is a number"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\]: unknown role 'tool'"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\]: unknown role missing or null"),
        ({"messages": [user([])]}, r"messages\[0\]: `content` is an empty list"),
        ({"messages": [user(None)]}, r"messages\[0\].content\[0\] is missing or null"),
        ({"messages": [user([{"type": "image", "url": "x"}])]}, r"content\[0\]: unknown type 'image'"),
        ({"messages": [user([{"type": "text", "text": 3}])]}, r"content\[0\]: `text` is a number"),
        ({"messages": [user([{"type": "text", "txt": "a"}])]}, r"content\[0\]: unknown key 'txt'"),
        ({"messages": [user("\ud800")]}, "half a surrogate pair at character 0"),
        ({"messages": [user([{"type": "audio"}])]}, r"content\[0\]: no audio is given"),
        ({"messages": [user([{"type": "audio", "audio_url": 3}])]}, "`audio_url` is a number"),
        ({"messages": [user([{"type": "audio", "audio_url": "https://x/a.wav"}])]}, "is a remote address"),
        ({"messages": [user([{**AUDIO, "offset": -1}])]}, "`offset` is -1"),
        ({"messages": [user([{**AUDIO, "offset": "1"}])]}, "`offset` is a string"),
        ({"messages": [user([{**AUDIO, "duration": 0}])]}, "`duration` is 0"),
        ({"messages": [user([{**AUDIO, "duration": 10**400}])]}, "`duration` is too large"),
        ({"messages": [user("x")]}, "nothing to learn"),
        ({"messages": [user([AUDIO]), assistant("text only")]}, "no assistant audio to learn"),
        ({"messages": [user("x"), assistant("")]}, "the assistant messages are empty"),
        (broken(start_index=3), "`start_index` is 3"),
        (broken(start_index=-1), "`start_index` is -1"),
        (broken(start_index=True), "`start_index` is True"),
        ({"messages": [user("x"), assistant([AUDIO]), user("y")], "start_index": 2}, "nothing to learn"),
        (
            {"messages": [user("x"), assistant([AUDIO]), assistant("y")], "start_index": 2},
            "no assistant audio to learn",
        ),
        (broken(speaker=3), "`speaker` is a number"),
        (broken(speaker="\ud800"), "`speaker` holds half a surrogate pair"),
        (broken(misc={"speaker": "\ud800"}), "`speaker` holds half a surrogate pair"),
        ({"messages": [user([{"type": "audio", "audio_url": "a\ud800"}])]}, "`audio_url` holds half a surrogate pair"),
        ({"messages": [{**assistant([AUDIO]), "recipient": "\ud800"}]}, "`recipient` holds half a surrogate pair"),
        ({**text_sample(), "audios": ["a.wav"]}, "`audios` beside messages of text alone"),
        (broken(misc="x"), "`misc` is a string"),
        ({"messages": [{"role": "user", "content": "x", "recipient": "y"}]}, "`recipient` 'y' of role user"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "unknown key 'name'"),
    ],
)
def test_what_is_wrong_is_said(sample, message):
    with pytest.raises(BadSampleError, match=message):
        parse_sample(sample)


@pytest.mark.parametrize(
    "sample",
    [
        cloning_sample("a.wav", "b.wav"),
        cloning_sample("a.wav", "b.wav", start_index=2.0, speaker="x", misc={"speaker": 3}, other="ignored"),
        text_sample(),
        {**text_sample(), "audios": []},
        {**cloning_sample("a.wav", "b.wav"), "audios": ["ignored, as other keys are"]},
        {"messages": [user("x"), {"role": "assistant", "content": AUDIO}]},
        {"messages": [user(["x", AUDIO]), assistant(["y", {"type": "audio", "raw_audio": "AAAA"}])]},
        {"messages": [user("x"), assistant([AUDIO]), assistant([AUDIO])], "start_index": 2},
    ],
)
def test_tokens_are_those_of_bosons_own_function(sample, tiny_base):
    layout = AudioLayout.from_config(read_model_config(tiny_base))
    tokenizer = load_tokenizer(tiny_base)
    parsed = parse_sample(sample)

    found = tokenize(parsed, tokenizer, layout)

    tokens, labels, contents, _ = prepare_chatml_sample(parsed, tokenizer)
    assert found.tokens == tokens
    assert [token if on else -100 for token, on in zip(found.tokens, found.supervised, strict=True)] == labels
    assert found.clips == contents


@pytest.mark.parametrize("token", ["<|AUDIO|>", "<|AUDIO_OUT|>"])
def test_a_placeholder_inside_a_text_is_refused(token, tiny_base):
    layout = AudioLayout.from_config(read_model_config(tiny_base))
    parsed = parse_sample(cloning_sample("a.wav", "b.wav", text=f"say {token}"))
    with pytest.raises(BadSampleError, match="4 audio placeholders for 2 audio items"):
        tokenize(parsed, load_tokenizer(tiny_base), layout)

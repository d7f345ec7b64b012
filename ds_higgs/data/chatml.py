"""Check one ChatML sample and turn it into boson's dataclasses, tokens and audio clips."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from boson_multimodal.constants import AUDIO_IN_TOKEN, AUDIO_OUT_TOKEN
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from transformers import PreTrainedTokenizerBase

from ds_higgs.batch import IGNORE_INDEX
from ds_higgs.data.problems import BadSampleError
from ds_higgs.layout import AudioLayout

ROLES = ("system", "user", "assistant")
NO_URL = ("", "placeholder")  # boson's way to say that raw_audio is meant
TEXT_KEYS = {"type", "text"}
AUDIO_KEYS = {"type", "audio_url", "raw_audio", "offset", "duration", "row_id"}


@dataclass(frozen=True)
class TokenizedSample:
    """What boson's prepare_chatml_sample makes of a sample, placeholders not expanded.

    supervised: for each token whether it is a label; the label is then the token itself.
    clips: one audio item per placeholder, in order.
    """

    tokens: list[int]
    supervised: list[bool]
    clips: list[AudioContent]


def parse_sample(data: Any) -> ChatMLSample:
    """Check a manifest entry and convert it to boson's types, content always a list of items.

    Raises:
        BadSampleError: with the first thing that is wrong and its place inside the sample.
    """
    if not isinstance(data, dict):
        raise BadSampleError(f"the sample is {_kind(data)}", "an object with `messages`")
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadSampleError(f"`messages` is {_kind(messages)}", "a list of at least one message")
    sample = ChatMLSample(
        messages=[_parse_message(message, f"messages[{turn}]") for turn, message in enumerate(messages)],
        start_index=_parse_start_index(data.get("start_index"), len(messages)),
        misc=_parse_optional(data, "misc", dict, "an object"),
        speaker=_parse_optional(data, "speaker", str, "a string"),
    )
    for speaker in (sample.speaker, (sample.misc or {}).get("speaker")):
        _check_unicode(speaker if isinstance(speaker, str) else "", "`speaker`")
    has_audio = any(isinstance(item, AudioContent) for message in sample.messages for item in message.content)
    if data.get("audios") and not has_audio:
        expected = "audio items in `messages`; `ds-higgs manifest` makes them from this form"
        raise BadSampleError("`audios` beside messages of text alone, the form of another tool", expected)
    _check_targets(sample)
    return sample


def tokenize(
    sample: ChatMLSample,
    tokenizer: PreTrainedTokenizerBase,
    layout: AudioLayout,
    *,
    references: Collection[int] = (),
) -> TokenizedSample:
    """Tokens, label mask and audio clips of a parsed sample, by boson's own prepare_chatml_sample.

    Args:
        references: audio items, counted over the sample, whose assistant turns are not learned.

    Raises:
        BadSampleError: the text holds an audio placeholder, which would stand for audio that is not there.
    """
    tokens, labels, clips, _ = prepare_chatml_sample(sample, tokenizer)
    if tokens is None:
        raise BadSampleError("boson's prepare_chatml_sample refused the sample (its reason is printed above)")
    placeholders = {layout.audio_in_token, layout.audio_out_token}
    found = sum(token in placeholders for token in tokens)
    if found != len(clips):
        raise BadSampleError(
            f"{found} audio placeholders for {len(clips)} audio items",
            f"no {AUDIO_IN_TOKEN} or {AUDIO_OUT_TOKEN} inside a text",
        )
    supervised = [label != IGNORE_INDEX for label in labels]
    places = [place for place, token in enumerate(tokens) if token in placeholders]
    for reference in references:
        _mask_run(supervised, places[reference])
    return TokenizedSample(tokens, supervised, clips)


def _mask_run(supervised: list[bool], place: int) -> None:
    """Clear the run of labels around `place`: an assistant turn's, since every turn's header is no label."""
    first, stop = place, place + 1
    while supervised[first - 1]:
        first -= 1
    while stop < len(supervised) and supervised[stop]:
        stop += 1
    supervised[first:stop] = [False] * (stop - first)


def _parse_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise BadSampleError(f"{where} is {_kind(message)}", "an object with `role` and `content`")
    role = message.get("role")
    if role not in ROLES:
        raise BadSampleError(f"{where}: unknown role {_shown(role)}", "one of " + ", ".join(ROLES))
    recipient = message.get("recipient")
    if recipient is not None and (role != "assistant" or not isinstance(recipient, str)):
        raise BadSampleError(f"{where}: `recipient` {_shown(recipient)} of role {role}", "a string, role assistant")
    _check_unicode(recipient or "", f"{where}: `recipient`")
    _refuse_unknown_keys(message, {"role", "content", "recipient"}, where)
    content = message.get("content")
    items = content if isinstance(content, list) else [content]
    if not items:
        raise BadSampleError(f"{where}: `content` is an empty list", "a string or at least one item")
    parsed = [_parse_item(item, f"{where}.content[{index}]") for index, item in enumerate(items)]
    return Message(role=role, content=parsed, recipient=recipient)


def _parse_item(item: Any, where: str) -> TextContent | AudioContent:
    if isinstance(item, str):
        item = {"type": "text", "text": item}
    if not isinstance(item, dict):
        raise BadSampleError(f"{where} is {_kind(item)}", "a string, a text item or an audio item")
    kind = item.get("type")
    if kind == "text":
        return _parse_text(item, where)
    if kind == "audio":
        return _parse_audio(item, where)
    raise BadSampleError(f"{where}: unknown type {_shown(kind)}", "text or audio")


def _parse_text(item: dict, where: str) -> TextContent:
    _refuse_unknown_keys(item, TEXT_KEYS, where)
    text = item.get("text")
    if not isinstance(text, str):
        raise BadSampleError(f"{where}: `text` is {_kind(text)}", "a string")
    _check_unicode(text, f"{where}: `text`")
    return TextContent(text=text)


def _check_unicode(text: str, what: str) -> None:
    """JSON can write what no file and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSampleError(f"{what} holds half a surrogate pair at character {error.start}") from None


def _parse_audio(item: dict, where: str) -> AudioContent:
    _refuse_unknown_keys(item, AUDIO_KEYS, where)
    url, raw = item.get("audio_url"), item.get("raw_audio")
    if url is not None and not isinstance(url, str):
        raise BadSampleError(f"{where}: `audio_url` is {_kind(url)}", "a path")
    if raw is not None and not isinstance(raw, str):
        raise BadSampleError(f"{where}: `raw_audio` is {_kind(raw)}", "base64 text")
    if url in (None, *NO_URL) and not raw:
        raise BadSampleError(f"{where}: no audio is given", "`audio_url` with a path, or `raw_audio` in base64")
    _check_unicode(url or "", f"{where}: `audio_url`")
    if url is not None and "://" in url:
        raise BadSampleError(f"{where}: {url!r} is a remote address", "a local file (nothing is downloaded)")
    return AudioContent(
        audio_url=url if url is not None else "",
        raw_audio=raw,
        offset=_parse_seconds(item.get("offset"), f"{where}: `offset`", minimum_is_zero=True),
        duration=_parse_seconds(item.get("duration"), f"{where}: `duration`", minimum_is_zero=False),
    )


def _parse_seconds(value: Any, what: str, *, minimum_is_zero: bool) -> float | None:
    if value is None:
        return None
    expected = "seconds, at least 0" if minimum_is_zero else "seconds, more than 0"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadSampleError(f"{what} is {_kind(value)}", expected)
    try:
        seconds = float(value)
    except OverflowError:
        raise BadSampleError(f"{what} is too large", expected) from None
    if not math.isfinite(seconds) or seconds < 0 or (seconds == 0 and not minimum_is_zero):
        raise BadSampleError(f"{what} is {value}", expected)
    return seconds


def _parse_start_index(value: Any, num_messages: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas turns a column of integers with gaps into floats
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_messages:
        raise BadSampleError(f"`start_index` is {_shown(value)}", f"the index of a message, 0 to {num_messages - 1}")
    return value


def _parse_optional(data: dict, key: str, kind: type, expected: str) -> Any:
    value = data.get(key)
    if value is not None and not isinstance(value, kind):
        raise BadSampleError(f"`{key}` is {_kind(value)}", f"{expected} or nothing")
    return value


def _check_targets(sample: ChatMLSample) -> None:
    """A sample with audio needs assistant audio to learn; one without any audio needs assistant text to learn."""
    first = sample.start_index or 0
    targets = [message for message in sample.messages[first:] if message.role == "assistant"]
    if not targets:
        raise BadSampleError("nothing to learn", "an assistant message (at or after `start_index`)")
    has_audio = any(isinstance(item, AudioContent) for message in sample.messages for item in message.content)
    has_target_audio = any(isinstance(item, AudioContent) for message in targets for item in message.content)
    if has_audio and not has_target_audio:
        raise BadSampleError("no assistant audio to learn", "audio in an assistant message (at or after `start_index`)")
    if not has_audio and not any(item.text for message in targets for item in message.content):
        raise BadSampleError("the assistant messages are empty", "text or audio to learn")


def _refuse_unknown_keys(item: dict, known: set[str], where: str) -> None:
    unknown = sorted(set(item) - known)
    if unknown:
        raise BadSampleError(f"{where}: unknown key {', '.join(map(repr, unknown))}", ", ".join(sorted(known)))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    if value is None:
        return "missing or null"
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool) else _kind(value)
    return text if len(text) <= 60 else text[:57] + "..."

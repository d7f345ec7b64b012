"""The forms of a voice-cloning prompt, and every text in them: the one owner of how speech is asked for.

`as_is` is the form of examples/voice_cloning: reference and request in one user message, the request in a phrase, its
text said again before the answer's audio. No server sends that. `boson` is what boson's examples, transformers' own
processor and vLLM-Omni send: reference text as a user turn, reference audio as an assistant turn, the bare text, audio
alone.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent

from ds_higgs.data.problems import BadSampleError
from ds_higgs.data.references import MovedSample, move_references

PromptForm = Literal["as_is", "boson"]
PromptForms = Literal["as_is", "boson", "mixed"]  # mixed: half an epoch's samples in each
ReferenceTurn = Literal["as_is", "assistant"]
# The forms that a sample is trained in, the first one that of the data set itself.
FORMS_OF: dict[PromptForms, tuple[PromptForm, ...]] = {
    "as_is": ("as_is",),
    "boson": ("boson",),
    "mixed": ("as_is", "boson"),
}

# Of the form as_is.
SYSTEM_MESSAGE = (
    "You are a helpful assistant capable of generating speech in the voice of the provided reference audio."
)
REQUEST = "Please generate speech for: "
# Of the form boson: the system message that servers send; boson's examples add a scene to it.
SERVED_SYSTEM_MESSAGE = "Generate audio following instruction."
# What may stand between a request's phrase and the text that it asks for.
_PHRASE_ENDS = (":", "：", "\n")


@dataclass(frozen=True)
class VoiceRequest:
    """What a voice-cloning sample says. Audio is an item as manifests have it; None: no reference."""

    text: str
    target: dict[str, Any]
    reference: dict[str, Any] | None = None
    reference_text: str | None = None


def served_form(form: PromptForms) -> PromptForm:
    """The form in which a model that was trained in `form` is validated and asked to speak."""
    return "boson" if form == "mixed" else form


def joint_form(forms: Collection[PromptForms]) -> PromptForms:
    """The form of a training on sources in these forms."""
    [form, *others] = set(forms)
    return "mixed" if others else form


def write_sample(request: VoiceRequest, form: PromptForm, *, system: str | None = None) -> dict[str, Any]:
    """The request as a manifest's sample: `messages`, and `start_index` where an assistant turn is not learned.

    Args:
        system: text of the system message; None: the form's own; "": none.

    Raises:
        BadSampleError: the form boson, and nobody knows what the reference says.
    """
    if system is None:
        system = SYSTEM_MESSAGE if form == "as_is" else SERVED_SYSTEM_MESSAGE
    messages = [{"role": "system", "content": system}] if system else []
    if form == "as_is":
        return {"messages": messages + _messages_as_is(request)}
    return _with_served_messages(request, messages)


def _messages_as_is(request: VoiceRequest) -> list[dict[str, Any]]:
    heard = [_text(request.reference_text)] if request.reference_text else []
    heard += [request.reference] if request.reference is not None else []
    return [
        {"role": "user", "content": [*heard, _text(REQUEST + request.text)]},
        {"role": "assistant", "content": [_text(request.text), request.target]},
    ]


def _with_served_messages(request: VoiceRequest, messages: list[dict[str, Any]]) -> dict[str, Any]:
    start: dict[str, int] = {}
    if request.reference is not None:
        if not request.reference_text:
            raise BadSampleError("nobody knows what the reference says", "its text, in the prompt form boson")
        messages = [
            *messages,
            {"role": "user", "content": [_text(request.reference_text.strip())]},
            {"role": "assistant", "content": [request.reference]},
        ]
        start = {"start_index": len(messages)}
    asked = {"role": "user", "content": [_text(request.text.strip())]}
    return {"messages": [*messages, asked, {"role": "assistant", "content": [request.target]}], **start}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def take_form(sample: ChatMLSample, form: PromptForm, reference_turn: ReferenceTurn) -> MovedSample:
    """A manifest's sample in the form that is trained: `boson` moves references whatever `reference_turn` says.

    Args:
        sample: as `parse_sample` gives it, every content a list.

    Raises:
        BadSampleError: a reference that has to be moved has no text before it, or no request after it.
    """
    if form == "boson" and _has_audio(sample):
        return _as_served(sample)
    if reference_turn == "assistant":
        return move_references(sample)
    return MovedSample(sample, frozenset())


def _has_audio(sample: ChatMLSample) -> bool:
    return any(isinstance(item, AudioContent) for message in sample.messages for item in message.content)


def _as_served(sample: ChatMLSample) -> MovedSample:
    """A sample with audio as servers would ask for it; a text that is no echo of its request stays."""
    moved = move_references(sample)
    messages = [_trimmed(message) if message.role != "assistant" else message for message in moved.sample.messages]
    for index in range(len(messages) - 1):
        messages[index : index + 2] = _bare(*messages[index : index + 2])
    messages, added = _with_served_system(messages)
    start_index = moved.sample.start_index
    if start_index is not None:
        start_index += added
    return MovedSample(replace(moved.sample, messages=messages, start_index=start_index), moved.references)


def _trimmed(message: Message) -> Message:
    """Without white space around its text, as the servers' chat template trims it."""
    if not all(isinstance(item, TextContent) for item in message.content):
        return message
    return replace(message, content=[TextContent("".join(item.text for item in message.content).strip())])


def _bare(user: Message, answer: Message) -> tuple[Message, Message]:
    """A request and its spoken answer without the request's phrase and without the echo before the audio.

    Two other messages stay as they are.
    """
    if (user.role, answer.role) != ("user", "assistant") or not isinstance(answer.content[-1], AudioContent):
        return user, answer
    asked, echo = _plain_text(user.content), _plain_text(answer.content[:-1])
    if asked is None or echo is None:
        return user, answer
    bare = asked.removeprefix(REQUEST.strip()).strip()
    if echo:
        found = _without_phrase(asked, echo)
        if found is None:
            return user, answer  # an answer in words of its own
        bare = found
    return replace(user, content=[TextContent(bare)]), replace(answer, content=[answer.content[-1]])


def _plain_text(items: Sequence[Any]) -> str | None:
    """The text of items that are all text."""
    if not all(isinstance(item, TextContent) for item in items):
        return None
    return "".join(item.text for item in items).strip()


def _without_phrase(asked: str, echo: str) -> str | None:
    """The text that is asked for, where `echo` repeats it; None where it does not."""
    words = len(echo.split())
    pieces = asked.split()
    if pieces[len(pieces) - words :] != echo.split():
        return None
    tail = asked
    for _ in range(len(pieces) - words):
        tail = tail.split(maxsplit=1)[1]
    phrase = asked.removesuffix(tail)
    return tail if not phrase or phrase.rstrip(" \t").endswith(_PHRASE_ENDS) else None


def _with_served_system(messages: list[Message]) -> tuple[list[Message], int]:
    """The messages under a system message that servers know, and how many were put before them.

    A text of one's own (a scene, say) stays; the sentence of the form as_is gives way.
    """
    served = Message("system", [TextContent(SERVED_SYSTEM_MESSAGE)])
    if messages[0].role != "system":
        return [served, *messages], 1
    if _plain_text(messages[0].content) in ("", SYSTEM_MESSAGE):
        return [served, *messages[1:]], 0
    return messages, 0

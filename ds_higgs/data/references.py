"""Moves reference audio into an earlier exchange: all of `data.reference_turn: assistant`, a part of the form boson."""

from dataclasses import dataclass, replace

from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent

from ds_higgs.data.problems import BadSampleError


@dataclass(frozen=True)
class MovedSample:
    """references: the audio items that were moved, counted over the sample's audio: they are not learned."""

    sample: ChatMLSample
    references: frozenset[int]


def move_references(sample: ChatMLSample) -> MovedSample:
    """Move the reference audio of user messages into exchanges of their own.

    user [reference text, reference audio, request] becomes user [reference text], assistant [reference audio],
    user [request]. `start_index` names the same message as before, so what else is learned stays as it was.

    Args:
        sample: as `parse_sample` gives it, every content a list.

    Raises:
        BadSampleError: a reference audio has no text before or after it.
    """
    messages: list[Message] = []
    references: list[int] = []
    start_index, num_audio = sample.start_index, 0
    for index, message in enumerate(sample.messages):
        if index == sample.start_index:
            start_index = len(messages)
        audio = range(num_audio, num_audio + sum(isinstance(item, AudioContent) for item in message.content))
        num_audio = audio.stop
        if message.role == "user" and audio:
            references += audio
            messages += _split(message, index)
        else:
            messages.append(message)
    return MovedSample(replace(sample, messages=messages, start_index=start_index), frozenset(references))


def _split(message: Message, index: int) -> list[Message]:
    """The exchanges that a user message with reference audio becomes, and the user message that is left."""
    messages: list[Message] = []
    texts: list[TextContent] = []
    for item in message.content:
        if isinstance(item, TextContent):
            texts.append(item)
            continue
        if not texts:
            raise BadSampleError(
                f"messages[{index}]: no text before the reference audio",
                "what the reference says before it, with data.reference_turn assistant or data.prompt_form boson",
            )
        messages += [Message(role="user", content=texts), Message(role="assistant", content=[item])]
        texts = []
    if not texts:
        raise BadSampleError(
            f"messages[{index}]: no text after the reference audio",
            "the request after it, with data.reference_turn assistant or data.prompt_form boson",
        )
    return [*messages, Message(role="user", content=texts)]

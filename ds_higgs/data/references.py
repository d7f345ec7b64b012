"""`data.reference_turn: assistant`: reference audio as an earlier exchange, the form of Boson's own voice cloning."""

from dataclasses import replace

from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent

from ds_higgs.data.problems import BadSampleError


def move_references(sample: ChatMLSample) -> ChatMLSample:
    """Move the reference audio of user messages into exchanges of their own, before what is learned.

    user [reference text, reference audio, request] becomes user [reference text], assistant [reference audio],
    user [request]; `start_index` then names the request, so that the reference is not learned. A sample without
    audio in user messages stays as it is.

    Args:
        sample: as `parse_sample` gives it, every content a list.

    Raises:
        BadSampleError: a reference audio has no text before it, or comes after audio that is learned.
    """
    targets = (index for index, message in enumerate(sample.messages) if _is_target(message, index, sample))
    first_target = next(targets, len(sample.messages))
    messages: list[Message] = []
    start_index = sample.start_index
    for index, message in enumerate(sample.messages):
        if message.role == "user" and any(isinstance(item, AudioContent) for item in message.content):
            if index > first_target:
                raise BadSampleError(
                    f"messages[{index}]: reference audio after audio that is learned",
                    "all reference audio before the first target, with data.reference_turn: assistant",
                )
            messages += _split(message, index)
            start_index = len(messages) - 1
        else:
            messages.append(message)
    return replace(sample, messages=messages, start_index=start_index)


def _is_target(message: Message, index: int, sample: ChatMLSample) -> bool:
    has_audio = any(isinstance(item, AudioContent) for item in message.content)
    return message.role == "assistant" and index >= (sample.start_index or 0) and has_audio


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
                "what the reference says before it, with data.reference_turn: assistant",
            )
        messages += [Message(role="user", content=texts), Message(role="assistant", content=[item])]
        texts = []
    if not texts:
        raise BadSampleError(
            f"messages[{index}]: no text after the reference audio",
            "the request after it, with data.reference_turn: assistant",
        )
    return [*messages, Message(role="user", content=texts)]

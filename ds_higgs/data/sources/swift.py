"""ms-swift's JSON lines: `{"messages": [...], "audios": [...]}` with <audio> in the texts."""

from pathlib import Path

from ds_higgs.data.manifest import Entry, read_manifest
from ds_higgs.data.sources.json_lines import key_finder
from ds_higgs.data.sources.utterance import Form, Utterance, collect, existing_file
from ds_higgs.errors import UserError

TAG = "<audio>"


def read_swift(path: Path, speaker: str | None = None) -> list[Utterance]:
    """Each <audio> gives way to the next of the line's `audios`.

    A line whose only audio is the assistant's is an utterance without a reference; others are whole samples.

    Raises:
        UserError: with every line that cannot be used.
    """
    return collect(path, read_manifest(path), lambda entry: _read_entry(path, entry, speaker), what="lines")


def _read_entry(path: Path, entry: Entry, speaker: str | None) -> Utterance:
    place = f"{path.name}:{entry.number}"
    if entry.error is not None:
        raise UserError(f"{place}: {entry.error}")
    return _utterance(path, place, entry.data, speaker)


def _utterance(path: Path, place: str, data: object, speaker: str | None) -> Utterance:
    if not isinstance(data, dict) or not isinstance(data.get("messages"), list):
        raise UserError(f"{place}: expected an object with `messages` and `audios`")
    audios = data.get("audios") or []
    if not isinstance(audios, list) or not all(isinstance(name, str) for name in audios):
        raise UserError(f"{place}: `audios` must be a list of paths")
    files = [str(existing_file(path.parent / name, place)) for name in audios]
    contents = [_content(message, place) for message in data["messages"]]
    tags = sum(text.count(TAG) for _, text in contents)
    if tags != len(files):
        raise UserError(f"{place}: {tags} times {TAG} in the messages, {len(files)} audios")
    spoken_by = speaker or data.get("speaker")
    audio_roles = [role for role, text in contents for _ in range(text.count(TAG))]
    if audio_roles == ["assistant"] and (text := _spoken_text(contents)):
        return Utterance(Path(files[0]), text, spoken_by, place)
    messages = tuple(_messages(contents, files))
    target = next((file for role, file in zip(audio_roles, files, strict=True) if role == "assistant"), None)
    if target is None:
        raise UserError(f"{place}: no {TAG} in an assistant message: nothing to learn")
    return Utterance(Path(target), "", spoken_by, place, messages=messages)


def _content(message: object, place: str) -> tuple[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
        raise UserError(f"{place}: each message must have a `role` and a `content` that is a string")
    return message["role"], message["content"]


def _spoken_text(contents: list[tuple[str, str]]) -> str:
    """What is spoken: the text beside the assistant's audio, else the last user message."""
    beside = next(text.replace(TAG, "").strip() for role, text in contents if TAG in text)
    asked = [text.strip() for role, text in contents if role == "user"]
    return beside or (asked[-1] if asked else "")


def _messages(contents: list[tuple[str, str]], files: list[str]) -> list[dict]:
    waiting = list(files)
    messages = []
    for role, text in contents:
        items: list[dict] = []
        for number, piece in enumerate(text.split(TAG)):
            if number > 0:
                items.append({"type": "audio", "audio_url": waiting.pop(0)})
            if piece.strip():
                items.append({"type": "text", "text": piece.strip()})
        messages.append({"role": role, "content": items})
    return messages


FORM = Form(
    name="swift",
    summary="JSON lines of ms-swift",
    find=key_finder(("messages",)),
    read=lambda path, _, speaker: read_swift(path, speaker),
)

"""Manifests as nobody would write them: sound samples, changed anywhere to all that JSON can say, and cannot."""

import base64
import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 24000
TOKENS = ("<|AUDIO|>", "<|AUDIO_OUT|>", "<|eot_id|>", "<|begin_of_text|>", "<audio>", "<|audio_out_bos|>")
STRINGS = (
    *("", " ", "x" * 5000, "\x00", "\u2028\u2029\x85", "\ud800", "سلام", "2026-11-21", "[bold]", "[/]", "%s{}", "\n"),
    *("assistant", "user", "system", "audio", "text", "placeholder", "../..", "~", "file:///a.wav", "a" * 300 + ".wav"),
    *TOKENS,
)
NUMBERS = (
    0,
    -0.0,
    -1,
    1,
    2,
    0.5,
    1e-320,
    1e-9,
    1e306,
    -1e306,
    1e18,
    2**63,
    10**40,
    10**400,
    float("nan"),
    float("inf"),
)
KEYS = (
    *("messages", "role", "content", "type", "text", "audio_url", "raw_audio", "offset", "duration", "row_id"),
    *("start_index", "speaker", "misc", "recipient", "audios", "id", "", "\u2028", "\ud800", "__class__"),
)


def write_audio(folder: Path) -> list[str]:
    """Sound and unsound files; their names."""
    time = np.arange(RATE // 2) / RATE
    tone = 0.3 * np.sin(2 * np.pi * 220 * time)
    soundfile.write(folder / "good.wav", tone, RATE)
    soundfile.write(folder / "good.flac", tone, RATE)
    soundfile.write(folder / "a\u2028[b].wav", tone, 16000)
    soundfile.write(folder / "silent.wav", 0 * tone, RATE)
    soundfile.write(folder / "nan.wav", np.where(time > 0.1, np.nan, tone), RATE, subtype="FLOAT")
    soundfile.write(folder / "one_sample.wav", tone[:1], RATE)
    soundfile.write(folder / "slow.wav", tone[:100], 1)
    (folder / "cut.wav").write_bytes((folder / "good.wav").read_bytes()[:999])
    (folder / "cut.flac").write_bytes((folder / "good.flac").read_bytes()[:999])
    (folder / "empty.wav").touch()
    (folder / "folder.wav").mkdir()
    return [*(path.name for path in folder.iterdir()), "absent.wav"]


def wild_manifest(seed: int, folder: Path, audio: list[str]) -> tuple[Path, list[str]]:
    """A manifest file made from `seed`, and flags to read it with."""
    chance = random.Random(seed)
    samples: list[Any] = [_sample(chance, folder, audio) for _ in range(chance.randint(1, 3))]
    for _ in range(chance.choice([0, 0, 1, 1, 2, 3])):
        samples = _changed(samples, chance)
    lines = isinstance(samples, list) and chance.random() < 0.5
    path = folder / f"manifest-{seed}.{'jsonl' if lines else 'json'}"
    path.write_bytes(_damaged(_written(samples, chance, lines=lines), chance))
    return path, _flags(chance)


def _sample(chance: random.Random, folder: Path, audio: list[str]) -> dict[str, Any]:
    def item() -> dict[str, Any]:
        name = "good.wav" if chance.random() < 0.85 else chance.choice(audio)
        found: dict[str, Any] = {"type": "audio", "audio_url": name}
        if chance.random() < 0.2 and (folder / name).is_file():
            found = {"type": "audio", "raw_audio": base64.b64encode((folder / name).read_bytes()).decode()}
        for key in ("offset", "duration"):
            if chance.random() < 0.08:
                found[key] = chance.choice([0.05, 0.2, *NUMBERS])
        return found

    user = ["What it says.", item(), {"type": "text", "text": "Say this."}]
    messages = [
        {"role": "system", "content": "Speak."},
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": "This."}, item()]},
    ]
    sample: dict[str, Any] = {"messages": messages * chance.choice([1, 1, 1, 2])}
    if chance.random() < 0.2:
        sample["start_index"] = chance.randrange(4)
    return sample | ({"speaker": "one"} if chance.random() < 0.3 else {})


def _changed(value: Any, chance: random.Random) -> Any:
    """A copy with one place changed, removed, repeated or added."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        changed = {name: copy.deepcopy(inner) for name, inner in value.items() if name != key or chance.random() < 0.95}
        if chance.random() < 0.15:
            changed[chance.choice(KEYS)] = _junk(chance)
        elif key in changed:
            changed[key] = _changed(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.9:
        index = chance.randrange(len(value))
        inner = [_changed(value[index], chance)] if chance.random() < 0.9 else chance.choice([[], [value[index]] * 2])
        return [*value[:index], *inner, *value[index + 1 :]]
    return _junk(chance)


def _junk(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.randrange(8 if depth < 3 else 4)
    if kind < 2:
        return chance.choice(STRINGS)
    if kind == 2:
        return chance.choice(NUMBERS)
    if kind == 3:
        return chance.choice([None, True, False, [], {}])
    if kind == 4:
        nested: Any = "x"
        for _ in range(chance.choice([3, 200])):
            nested = [nested] if chance.random() < 0.5 else {"content": nested}
        return nested
    if kind < 7:
        return {chance.choice(KEYS): _junk(chance, depth + 1) for _ in range(chance.randint(1, 3))}
    return [_junk(chance, depth + 1) for _ in range(chance.randint(1, 3))]


def _written(samples: Any, chance: random.Random, *, lines: bool) -> bytes:
    ascii_only = chance.random() < 0.6
    if lines:
        end = chance.choice(["\n", "\n", "\r\n", "\n\n"])
        text = end.join(json.dumps(sample, ensure_ascii=ascii_only) for sample in samples)
    else:
        text = json.dumps(samples, ensure_ascii=ascii_only, indent=chance.choice([None, 1]))
    content = text.encode("utf-8", "surrogatepass")
    mark = b"\xef\xbb\xbf" if chance.random() < 0.1 else b""
    return text.encode("utf-16", "surrogatepass") if chance.random() < 0.02 else mark + content


def _damaged(content: bytes, chance: random.Random) -> bytes:
    if not content or chance.random() < 0.8:
        return content
    place, damaged = chance.randrange(len(content)), bytearray(content)
    kind = chance.randrange(5)
    if kind == 0:
        del damaged[place:]
    elif kind == 1:
        damaged[place] ^= 1 << chance.randrange(8)
    elif kind == 2:
        damaged[place:place] = chance.choice([b"[" * 100_000, b"9" * 5000, b"\\u", b'"', b"\x00", b"NaN", b"\n"])
    elif kind == 3:
        damaged[place:place] = damaged[: chance.randrange(len(damaged))]
    else:
        damaged = bytearray(chance.choice([b"", b" \n", b"[]", b"[[]]", b"{", b"\xff\xfe", b"null", b"[1,]", b"[{}]x"]))
    return bytes(damaged)


def _flags(chance: random.Random) -> list[str]:
    flags = []
    for share, flag in (
        (0.6, "--data.on_bad_sample=skip"),
        (0.4, "--data.reference_turn=assistant"),
        (0.4, "--data.prompt_form=mixed"),
        (0.1, "--data.max_tokens=60"),
        (0.2, "--data.min_audio_s=0"),
        (0.1, "--data.max_audio_s=0.3"),
        (0.5, "--json"),
    ):
        if chance.random() < share:
            flags.append(flag)
    return flags

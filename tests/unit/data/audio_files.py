"""Audio that the data tests are made of."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile

RATE = 24000


def tone(seconds: float, *, rate: int = RATE, pitch: float = 220.0, seed: int = 0) -> np.ndarray:
    """A harmonic tone with a little noise, [samples] float32, peak about 0.5."""
    time = np.arange(round(seconds * rate)) / rate
    harmonics = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 5))
    noise = np.random.default_rng(seed).normal(scale=0.05, size=len(time))
    return (0.2 * harmonics + 0.1 * noise).astype(np.float32)


def write_tone(path: Path, seconds: float = 1.0, *, rate: int = RATE, pitch: float = 220.0, seed: int = 0) -> Path:
    """Write a tone in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, rate=rate, pitch=pitch, seed=seed), rate)
    return path


def cloning_sample(reference: str, target: str, text: str = "Hello there.", **fields) -> dict:
    """A voice-cloning sample as the README shows it."""
    return {
        "messages": [
            {"role": "system", "content": "Speak in the voice of the reference."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What the reference says."},
                    {"type": "audio", "audio_url": reference},
                    {"type": "text", "text": f"Please generate speech for: {text}"},
                ],
            },
            {
                "role": "assistant",
                "content": [{"type": "text", "text": text}, {"type": "audio", "audio_url": target}],
            },
        ],
        **fields,
    }


def write_chain(folder: Path, clips: int, *, longer_by: float) -> list[dict]:
    """Tones `0.wav` and so on, each `longer_by` seconds, in which each clip is the next one's reference."""
    for index in range(clips):
        write_tone(folder / f"{index}.wav", 0.2 + longer_by * index, pitch=100 + 10 * index, seed=index)
    return [cloning_sample(f"{index}.wav", f"{(index + 1) % clips}.wav") for index in range(clips)]


def write_lines(path: Path, samples: Iterable[dict]) -> Path:
    """A manifest of JSON lines."""
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def text_sample(question: str = "What is two and two?", answer: str = "Four.") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

"""Make this folder's audio and manifests with espeak-ng: 4 voices, English and Arabic, 32 utterances.

    python examples/voice_cloning/make_audio.py

Needs espeak-ng 1.51 or later on the PATH, and librosa and soundfile. The audio is kept in the repository, so that
nobody needs espeak-ng to run the example; this script says exactly where it came from and makes it again.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import librosa
import numpy as np
import soundfile

SAMPLE_RATE = 24_000
PEAK = 0.7
SILENCE_THRESHOLD_DB = 50
NUM_VALIDATION = 2  # per speaker, the last ones; they are each other's reference

SYSTEM_PROMPT = "You are a helpful assistant capable of generating speech in the voice of the provided reference audio."
REQUEST = "Please generate speech for: {text}"


@dataclass(frozen=True)
class Speaker:
    """One espeak-ng voice with its variant, pitch (0 to 99) and speed (words per minute)."""

    name: str
    voice: str
    pitch: int
    speed: int
    sentences: tuple[str, ...]


SPEAKERS = (
    Speaker(
        "speaker_001",
        voice="en-us+m3",
        pitch=35,
        speed=170,
        sentences=(
            "The ferry leaves at seven in the morning.",
            "Rain is expected over the northern hills.",
            "Please close the window before you go.",
            "She keeps her maps in a wooden box.",
            "Two lanterns were burning by the gate.",
            "The bakery on the corner opens early.",
            "We walked along the river until dusk.",
            "Nobody heard the second bell ring.",
        ),
    ),
    Speaker(
        "speaker_002",
        voice="en-gb-x-rp+f3",
        pitch=62,
        speed=180,
        sentences=(
            "A small green door leads to the garden.",
            "The train was late, but the tea was warm.",
            "Could you read the last line again?",
            "Fresh bread and honey are on the table.",
            "The children built a boat out of paper.",
            "Snow covered the fields during the night.",
            "He plays the cello every Thursday evening.",
            "Our letters crossed somewhere at sea.",
        ),
    ),
    Speaker(
        "speaker_003",
        voice="ar+m7",
        pitch=40,
        speed=165,
        sentences=(
            "صباح الخير يا أصدقائي.",
            "الطقس جميل اليوم في المدينة.",
            "أحب قراءة الكتب القديمة.",
            "يفتح السوق أبوابه مبكرا.",
            "سافرنا إلى الجبل في الصيف.",
            "القهوة جاهزة على الطاولة.",
            "وصل القطار إلى المحطة متأخرا.",
            "يلعب الأطفال قرب البحر.",
        ),
    ),
    Speaker(
        "speaker_004",
        voice="ar+f2",
        pitch=70,
        speed=175,
        sentences=(
            "أهلا وسهلا بكم في بيتنا.",
            "تشرق الشمس فوق النهر.",
            "كتبت الرسالة بقلم أزرق.",
            "نذهب إلى المدرسة كل صباح.",
            "هذا الخبز طازج ولذيذ.",
            "سقط المطر طوال الليل.",
            "تعزف أختي على العود.",
            "الحديقة خلف الباب الأخضر.",
        ),
    ),
)


def speak(text: str, speaker: Speaker) -> np.ndarray:
    """Return espeak-ng's speech of `text`: mono float32 at SAMPLE_RATE, trimmed, its peak at PEAK."""
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        command = ["espeak-ng", "-v", speaker.voice, "-p", str(speaker.pitch), "-s", str(speaker.speed), "-w", str(wav)]
        subprocess.run([*command, text], check=True)
        waveform, _ = librosa.load(wav, sr=SAMPLE_RATE, mono=True)
    waveform, _ = librosa.effects.trim(waveform, top_db=SILENCE_THRESHOLD_DB)
    return waveform * (PEAK / np.abs(waveform).max())


def write_audio(folder: Path) -> float:
    """Write `folder`/SPEAKER_NN.flac for every sentence of every speaker; return the seconds written."""
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    for speaker in SPEAKERS:
        for index, text in enumerate(speaker.sentences):
            waveform = speak(text, speaker)
            soundfile.write(folder / audio_name(speaker, index), waveform, SAMPLE_RATE, subtype="PCM_16")
            seconds += len(waveform) / SAMPLE_RATE
    return seconds


def audio_name(speaker: Speaker, index: int) -> str:
    return f"{speaker.name}_{index:02d}.flac"


def build_sample(speaker: Speaker, *, target: int, reference: int) -> dict:
    """Return one ChatML sample: `speaker` is heard saying `reference` and asked to say `target`."""
    text = speaker.sentences[target]
    user = [
        {"type": "text", "text": speaker.sentences[reference]},
        {"type": "audio", "audio_url": f"audio/{audio_name(speaker, reference)}"},
        {"type": "text", "text": REQUEST.format(text=text)},
    ]
    assistant = [
        {"type": "text", "text": text},
        {"type": "audio", "audio_url": f"audio/{audio_name(speaker, target)}"},
    ]
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ],
        "speaker": speaker.name,
    }


def build_samples(speaker: Speaker, utterances: Sequence[int]) -> list[dict]:
    """Make every utterance a target once, with the next one (round the circle) as its reference."""
    references = [*utterances[1:], utterances[0]]
    return [build_sample(speaker, target=t, reference=r) for t, r in zip(utterances, references, strict=True)]


def build_manifests() -> dict[str, list[dict]]:
    """Return the samples of `train.json` and `val.json`; no utterance is in both."""
    manifests: dict[str, list[dict]] = {"train.json": [], "val.json": []}
    for speaker in SPEAKERS:
        utterances = range(len(speaker.sentences))
        manifests["train.json"] += build_samples(speaker, utterances[:-NUM_VALIDATION])
        manifests["val.json"] += build_samples(speaker, utterances[-NUM_VALIDATION:])
    return manifests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: this one)")
    out = parser.parse_args().out
    if shutil.which("espeak-ng") is None:
        parser.error("espeak-ng is not installed (Debian and Ubuntu: apt-get install espeak-ng)")
    seconds = write_audio(out / "audio")
    for name, samples in build_manifests().items():
        text = json.dumps(samples, ensure_ascii=False, indent=1)
        (out / name).write_text(text + "\n", encoding="utf-8")
        print(f"{name}: {len(samples)} samples")
    print(f"audio: {seconds:.1f} s of {len(SPEAKERS)} speakers")


if __name__ == "__main__":
    main()

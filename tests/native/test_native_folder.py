"""A merged export speaks, in an environment with transformers >= 5.3 and nothing of ours, the codes that we speak."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import soundfile
import torch

from ds_higgs.commands.export import export
from ds_higgs.commands.generate import Reference, VoiceOptions, build_prompt, load_voice
from ds_higgs.data.prompt_forms import SERVED_SYSTEM_MESSAGE
from ds_higgs.data.prompts import collate_prompt
from ds_higgs.model.generation import GREEDY, generate_codes, read_stream
from tests.support.runs import write_run

PYTHON = os.environ.get("DS_HIGGS_NATIVE_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="DS_HIGGS_NATIVE_PYTHON names no environment")

TEXT, HEARD = "صباح الخير يا أصدقاء.", "It was the night before my birthday."
MAX_FRAMES = 40
HOP = 960


def test_the_folder_speaks_as_the_adapter_does(tiny_base: Path, example_dir: Path, tmp_path: Path):
    reference = whole_frames(example_dir / "audio" / "speaker_001_00.flac", tmp_path / "reference.wav")
    write_run(tmp_path / "run", tiny_base, prompt_form="boson")
    export(tmp_path / "run", tmp_path / "native", merge=True, precision="fp32", layout="transformers")
    asked = {"text": TEXT, "reference_text": HEARD, "system": SERVED_SYSTEM_MESSAGE, "max_new_tokens": MAX_FRAMES + 9}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    files = [tmp_path / "asked.json", reference, tmp_path / "spoken.json", tmp_path / "spoken.wav"]
    command = [str(PYTHON), str(Path(__file__).with_name("speak.py")), *map(str, files)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, check=True, cwd=tmp_path / "native", env=environment)

    voice, _ = load_voice(VoiceOptions(adapter=tmp_path / "run"))
    prompt = build_prompt(TEXT, voice=voice, reference=Reference(reference, HEARD))
    inputs = collate_prompt(prompt, voice.collator)
    ours = generate_codes(voice.model, inputs, max_frames=MAX_FRAMES, sampling=GREEDY, seed=0).codes
    theirs = read_stream(torch.tensor(json.loads((tmp_path / "spoken.json").read_text())).t(), voice.model.config)
    assert ours.shape == (8, MAX_FRAMES)
    assert torch.equal(ours, theirs[:, :MAX_FRAMES])
    assert soundfile.info(tmp_path / "spoken.wav").samplerate == 24_000


@pytest.mark.slow
@pytest.mark.parametrize("merge", [True, False])
def test_the_cards_code_speaks_to_a_wav_file(merge: bool, tiny_base: Path, tmp_path: Path):
    """As it is printed, with the native codec's own classes (random weights) where the card's model names a codec.

    torchaudio, whose wheels cannot be loaded beside CPU torch, is an empty package: encoding alone calls it.
    """
    stand_in = tmp_path / "packages" / "torchaudio"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(stand_in.parent), "HF_HUB_OFFLINE": "1"}
    write_run(tmp_path / "run", tiny_base, prompt_form="boson")
    export(tmp_path / "run", tmp_path / "whole", merge=True, layout="transformers")
    subprocess.run(
        [str(PYTHON), str(Path(__file__).with_name("codec.py")), "whole"], check=True, cwd=tmp_path, env=environment
    )
    title = "whole"
    if not merge:
        title = "adapter"
        export(tmp_path / "run", tmp_path / title, base="whole", layout="transformers")
    card = (tmp_path / title / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "card.py").write_text(code, encoding="utf-8")
    subprocess.run([str(PYTHON), "card.py"], check=True, cwd=tmp_path, env=environment)
    spoken = soundfile.info(tmp_path / "speech.wav")
    assert (spoken.samplerate, spoken.channels) == (24_000, 1)
    assert spoken.frames > 0


def whole_frames(audio: Path, out: Path) -> Path:
    """The recording without what is no whole frame: we pad that with silence, the native processor leaves it out."""
    samples, rate = soundfile.read(audio, dtype="int16")
    soundfile.write(out, samples[: len(samples) // HOP * HOP], rate)
    return out

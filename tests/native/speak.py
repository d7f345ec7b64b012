"""Run by test_native_folder.py in an environment with transformers >= 5.3 alone, in an exported folder: it speaks.

    cd FOLDER && python speak.py ASKED REFERENCE OUTPUT WAV

ASKED is JSON: text, reference_text, system, max_new_tokens; OUTPUT is JSON: the columns that were spoken, from the
stream BOS on, [columns][codebooks].
"""

import json
import sys
from pathlib import Path

import soundfile
import torch
from transformers import AutoProcessor, HiggsAudioV2ForConditionalGeneration

asked_file, reference, output, wav = sys.argv[1:]
asked = json.loads(Path(asked_file).read_text())
processor = AutoProcessor.from_pretrained(".", local_files_only=True)
model, loading = HiggsAudioV2ForConditionalGeneration.from_pretrained(
    ".", use_text_head=True, dtype=torch.float32, local_files_only=True, output_loading_info=True
)
assert not [*loading["missing_keys"], *loading["unexpected_keys"]], loading
waveform, rate = soundfile.read(reference, dtype="float32")
conversation = [
    {"role": "system", "content": [{"type": "text", "text": asked["system"]}]},
    {"role": "user", "content": [{"type": "text", "text": asked["reference_text"]}]},
    {"role": "assistant", "content": [{"type": "audio", "audio": waveform}]},
    {"role": "user", "content": [{"type": "text", "text": asked["text"]}]},
]
inputs = processor.apply_chat_template(
    conversation,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    sampling_rate=rate,
)
spoken = model.eval().generate(**inputs, max_new_tokens=asked["max_new_tokens"], do_sample=False, ras_win_len=None)
columns = spoken[0, inputs["audio_input_ids"].shape[1] :]
Path(output).write_text(json.dumps(columns.tolist()))
# As the processor's own decode, which takes codecs of Higgs' kind alone: a DAC wants its codes by name.
codes = processor.revert_delay_pattern(columns[1:]).clip(0, processor.audio_stream_bos_id - 1)
decoded = processor.audio_tokenizer.decode(audio_codes=codes.t().unsqueeze(0)).audio_values
soundfile.write(wav, decoded.detach().squeeze().numpy(), rate)

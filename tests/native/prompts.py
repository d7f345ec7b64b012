"""Run by test_native_prompts.py in an environment with transformers >= 5.3: its processor's prompts, as a file.

    python prompts.py BASE AUDIO CONVERSATIONS CHAT_TEMPLATE OUTPUT

CONVERSATIONS is a JSON list of [text, reference text or null, system text]; OUTPUT is JSON: for each the token ids, the
reference's columns [columns][codebooks] as they enter the model, and its plain codes [codebooks][frames].
"""

import json
import sys
from pathlib import Path

import soundfile
import torch
from transformers import AutoTokenizer, DacFeatureExtractor, DacModel, HiggsAudioV2Processor

base, audio_file, conversations, chat_template, output = sys.argv[1:]
codec = DacModel.from_pretrained(Path(base) / "codec")
codec.config.num_quantizers = codec.config.n_codebooks  # as the config of Higgs' own tokenizer calls it
tokenizer = AutoTokenizer.from_pretrained(base)
processor = HiggsAudioV2Processor(
    DacFeatureExtractor(sampling_rate=24000, hop_length=1),
    tokenizer,
    codec,
    chat_template=Path(chat_template).read_text(),
    # The token behind <|audio_out_bos|>: <|reserved_special_token_6|> in the released vocabulary.
    audio_delay_token=tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids("<|audio_out_bos|>") + 1),
)
waveform, rate = soundfile.read(audio_file, dtype="float32")
assert rate == 24000


def read(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


found = []
for text, reference_text, system in json.loads(Path(conversations).read_text()):
    messages = [read("system", system)]
    if reference_text is not None:
        messages += [
            read("user", reference_text),
            {"role": "assistant", "content": [{"type": "audio", "audio": waveform}]},
        ]
    inputs = processor.apply_chat_template(
        [*messages, read("user", text)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        sampling_rate=24000,
    )
    columns = inputs["audio_input_ids"][0].tolist() if "audio_input_ids" in inputs else []
    found.append({"input_ids": inputs["input_ids"][0].tolist(), "columns": columns})
with torch.no_grad():
    values = processor.feature_extractor(waveform, sampling_rate=24000, return_tensors="pt")["input_values"]
    codes = codec.encode(values).audio_codes[0].tolist()
Path(output).write_text(json.dumps({"prompts": found, "codes": codes}))

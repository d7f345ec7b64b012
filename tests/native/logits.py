"""Run by test_native_format.py in an environment with transformers >= 5.3: a native model's logits, as a file.

    python logits.py MODEL INPUTS OUTPUT [--adapter ADAPTER]

INPUTS and OUTPUT are safetensors files: input_ids [1, seq] and audio_codes [codebooks, frames] in; text [seq, vocab],
audio [frames, codebooks, codebook_size] and greedy [codebooks, steps] out.
"""

import argparse

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, HiggsAudioV2ForConditionalGeneration

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("inputs")
parser.add_argument("output")
parser.add_argument("--adapter")
arguments = parser.parse_args()

model = HiggsAudioV2ForConditionalGeneration.from_pretrained(
    arguments.model, use_text_head=True, dtype=torch.float32, local_files_only=True
)
if arguments.adapter:
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, arguments.adapter).base_model.model
model.eval()
config = AutoConfig.from_pretrained(arguments.model)
inputs = load_file(arguments.inputs)
audio_input_ids = inputs["audio_codes"].t().unsqueeze(0)
audio = {
    "audio_input_ids": audio_input_ids,
    "audio_input_ids_mask": torch.ones(audio_input_ids.shape[:2], dtype=torch.bool),
}
is_audio = inputs["input_ids"][0] == config.audio_token_id

with torch.no_grad():
    hidden = model.model(input_ids=inputs["input_ids"], **audio).last_hidden_state[0]
    text_logits, audio_logits = model.text_lm_head(hidden), model.audio_lm_head(hidden[is_audio])
    prompt = inputs["prompt_ids"]
    length = int((prompt == config.audio_token_id).sum())
    generated = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        audio_input_ids=audio_input_ids[:, :length],
        audio_input_ids_mask=audio["audio_input_ids_mask"][:, :length],
        max_new_tokens=int(inputs["max_new_tokens"]),
        do_sample=False,
        ras_win_len=None,
    )
save_file(
    {
        "text": text_logits.contiguous(),
        "audio": audio_logits.view(-1, config.num_codebooks, config.codebook_size).contiguous(),
        "greedy": generated[0, length:].t().contiguous(),
    },
    arguments.output,
)

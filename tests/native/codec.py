"""Run by test_native_folder.py in the native environment: gives an exported folder a codec of the native classes.

    python codec.py FOLDER

Small and with random weights; the folder's processor points to it as it would to the released one.
"""

import json
import sys
from pathlib import Path

from transformers import DacConfig, HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel, HubertConfig

folder = Path(sys.argv[1]).resolve()
config = HiggsAudioV2TokenizerConfig(
    semantic_model_config=HubertConfig(num_hidden_layers=2, num_attention_heads=4, intermediate_size=128),
    acoustic_model_config=DacConfig(
        encoder_hidden_size=16,
        downsampling_ratios=[8, 5, 4, 2, 3],
        upsampling_ratios=[3, 2, 4, 5, 8],
        decoder_hidden_size=128,
        hidden_size=256,
        sampling_rate=24000,
    ),
)
HiggsAudioV2TokenizerModel(config).eval().save_pretrained(folder / "native_codec")
file = folder / "processor_config.json"
values = json.loads(file.read_text())
values["audio_tokenizer"] = {
    "audio_tokenizer_class": "HiggsAudioV2TokenizerModel",
    "audio_tokenizer_name_or_path": str(folder / "native_codec"),
}
file.write_text(json.dumps(values))

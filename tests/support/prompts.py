"""A prompt from which the tiny base speaks."""

import torch

from ds_higgs.batch import ModelInputs
from ds_higgs.model.loading import HiggsAudioModel


def make_prompt(model: HiggsAudioModel, text: list[int], *, in_frames: int = 0, out_frames: int = 0) -> ModelInputs:
    """Reference audio of a user message and of an assistant turn, then a text, then the start of the speech."""
    config = model.config
    tokens = [config.audio_in_token_idx] * bool(in_frames) + [config.audio_out_token_idx] * bool(out_frames)
    input_ids = torch.tensor([[3, *tokens, *text, config.audio_out_bos_token_id]])
    numbers = torch.Generator().manual_seed(in_frames)
    start = torch.zeros(1, dtype=torch.long)
    return ModelInputs(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        audio_in_ids=torch.randint(0, 1024, (8, in_frames), generator=numbers),
        audio_in_ids_start=start[: bool(in_frames)],
        audio_out_ids=torch.randint(0, 1024, (8, out_frames), generator=numbers),
        audio_out_ids_start=start[: bool(out_frames)],
        audio_out_ids_start_group_loc=torch.zeros(int(out_frames > 0), dtype=torch.long),
    )

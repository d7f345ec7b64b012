"""Prompts from which the tiny base speaks."""

import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig

from ds_higgs.batch import ModelInputs


def make_prompt(
    config: HiggsAudioConfig,
    text: list[int],
    *,
    in_frames: int = 0,
    out_frames: int = 0,
    random: torch.Generator | None = None,
    **features: torch.Tensor,
) -> ModelInputs:
    """Reference audio of a user message and of an assistant turn, then a text, then the start of the speech.

    random: gives the codes of the references; by default one that `in_frames` seeds.
    features: what a Whisper base hears of the request's reference.
    """
    tokens = [config.audio_in_token_idx] * bool(in_frames) + [config.audio_out_token_idx] * bool(out_frames)
    input_ids = torch.tensor([[3, *tokens, *text, config.audio_out_bos_token_id]])
    random = random or torch.Generator().manual_seed(in_frames)
    start = torch.zeros(1, dtype=torch.long)
    return ModelInputs(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        audio_in_ids=torch.randint(0, 1024, (8, in_frames), generator=random),
        audio_in_ids_start=start[: bool(in_frames)],
        audio_out_ids=torch.randint(0, 1024, (8, out_frames), generator=random),
        audio_out_ids_start=start[: bool(out_frames)],
        audio_out_ids_start_group_loc=start[: bool(out_frames)],
        **features,
    )

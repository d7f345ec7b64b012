"""Teacher-forced accuracy: how often the likeliest code is the right one, codebook by codebook."""

from dataclasses import dataclass

import torch
from peft import PeftModel

from ds_higgs.batch import IGNORE_INDEX, Batch
from ds_higgs.model.loading import HiggsAudioModel
from ds_higgs.model.lora import unwrap


@dataclass(frozen=True)
class CodeAccuracy:
    """correct, total: [codebooks], labels predicted right and all labels."""

    correct: torch.Tensor
    total: torch.Tensor

    def per_codebook(self) -> list[float]:
        """Share of right predictions, 0 to 1; 0 where a codebook has no labels."""
        return (self.correct / self.total.clamp(min=1)).tolist()

    def overall(self) -> float:
        return float(self.correct.sum() / self.total.sum().clamp(min=1))


def count_correct(audio_logits: torch.Tensor, audio_labels: torch.Tensor) -> CodeAccuracy:
    """Compare each frame's likeliest codes with the next frame's labels.

    Args:
        audio_logits: [frames, codebooks, codebook_size].
        audio_labels: [codebooks, frames], not shifted, IGNORE_INDEX where nothing is to be learned.
    """
    predicted = audio_logits[:-1].argmax(dim=-1).t()
    labels = audio_labels[:, 1:]
    counted = labels != IGNORE_INDEX
    return CodeAccuracy(correct=((predicted == labels) & counted).sum(dim=1), total=counted.sum(dim=1))


@torch.no_grad()
def measure_accuracy(model: PeftModel | HiggsAudioModel, batch: Batch) -> CodeAccuracy:
    """The accuracy on one micro-batch; `model` is in evaluation mode."""
    higgs = unwrap(model)
    outputs = higgs(**batch.model_inputs.to(higgs.device), use_cache=False)
    return count_correct(outputs.audio_logits.cpu(), batch.labels.audio)

"""`loss.keep_base`: how far the model is from its base, as a loss.

The base is the same model with its adapter off. Where a target is predicted, the loss is KL(base || model) of the two
distributions: 0 where they are equal, as they are before the first step of a new adapter.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ds_higgs.batch import IGNORE_INDEX
from ds_higgs.losses import Project, head_loss_sum, loss_scales
from ds_higgs.training.results import Divergence, StepResult

ProjectBase = Callable[[Project, torch.Tensor], torch.Tensor]  # what the head does, and rows, to the base's logits


class KeptScales(NamedTuple):
    """What sums of divergences are multiplied with: [1 + codebooks] fp32; text, audio: whether they are taken."""

    values: torch.Tensor
    text: bool
    audio: bool


@dataclass(frozen=True)
class KeptBase:
    """weight: of the divergence beside the other losses; text, audio: where it is taken.

    sources: numbers of those whose samples it is taken on; None: all.
    codebooks: weights that sum to 1, as of the audio loss.
    """

    weight: float
    text: bool
    audio: bool
    sources: frozenset[int] | None
    codebooks: tuple[float, ...]

    def covers(self, source: int) -> bool:
        """Whether it is taken on a source's samples."""
        return self.sources is None or source in self.sources

    def scales(self, counts: torch.Tensor, *, times: float) -> KeptScales:
        """Of a global batch, `times` as large.

        Args:
            counts: [num_sources, 1 + codebooks], targets of the global batch.
        """
        scales = loss_scales(
            self._covered(counts),
            text_weight=self.weight * self.text,
            audio_weight=self.weight * self.audio,
            codebook_weights=self.codebooks,
        )
        return KeptScales((scales * times).float(), self.text, self.audio)

    def add_to(self, result: StepResult, sums: torch.Tensor, counts: torch.Tensor) -> StepResult:
        """The result with the divergence, whose weighted value is part of the loss.

        Args:
            sums, counts: [num_sources, 1 + codebooks] of the global batch: divergences and targets.
        """
        per_source = tuple(
            self._with_divergence(one, sums[number], counts[number]) if self.covers(number) else one
            for number, one in enumerate(result.per_source)
        )
        whole = self._with_divergence(result, self._covered(sums), self._covered(counts))
        return replace(whole, per_source=per_source)

    def _covered(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the sources that it is taken on."""
        covered = values.new_tensor([self.covers(number) for number in range(len(values))])
        return (values * covered.unsqueeze(1)).sum(dim=0)

    def _with_divergence(self, result: StepResult, sums: torch.Tensor, counts: torch.Tensor) -> StepResult:
        text, *codebooks = (sums / counts.clamp(min=1)).tolist()
        audio = sum(weight * value for weight, value in zip(self.codebooks, codebooks, strict=True))
        found = Divergence(text if self.text else None, audio if self.audio else None)
        return replace(result, keep_base=found, loss=result.loss + self.weight * found.total)


def text_divergence_sum(
    rows: torch.Tensor,
    base_rows: torch.Tensor,
    head: nn.Module,
    project_base: ProjectBase,
    *,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """Sum of KL(base || model) over rows of final hidden states [rows, hidden]: [] fp32; see `losses.text_loss_sum`."""
    return head_loss_sum(rows, base_rows, head, partial(_divergence_sum, project_base=project_base), scale=scale)


def _divergence_sum(
    project: Project, rows: torch.Tensor, base_rows: torch.Tensor, *, project_base: ProjectBase
) -> torch.Tensor:
    base = project_base(project, base_rows)
    return _divergences(project(rows), base).sum()


def audio_divergence_sums(logits: torch.Tensor, base_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of KL(base || model) of every codebook where it has a label: [codebooks] fp32.

    Args:
        logits, base_logits: [rows, codebooks * codebook_size].
        labels: [codebooks, rows] int64, IGNORE_INDEX where a codebook has no target.
    """
    codebooks, rows = labels.shape
    shape = (rows, codebooks, logits.shape[-1] // codebooks)  # no -1, which no rows at all would leave open
    found = _divergences(logits.view(shape), base_logits.view(shape)).sum(dim=-1)
    return torch.where(labels.t() == IGNORE_INDEX, 0.0, found).sum(dim=0)


def _divergences(logits: torch.Tensor, base_logits: torch.Tensor) -> torch.Tensor:
    """KL(base || model), the term of each class."""
    return F.kl_div(
        logits.float().log_softmax(dim=-1),
        base_logits.float().log_softmax(dim=-1),
        reduction="none",
        log_target=True,
    )

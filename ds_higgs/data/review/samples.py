"""A manifest's samples as warnings see them: what is asked, what is said, by whom, and which clips."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_higgs.data.build import Preparation
from ds_higgs.data.clips import Clip
from ds_higgs.data.manifest import read_manifest, sample_id
from ds_higgs.data.prompt_forms import REQUEST
from ds_higgs.data.prompts import spoken_text
from ds_higgs.data.review.kinds import DataWarning
from ds_higgs.layout import AudioLayout


@dataclass(frozen=True)
class ReviewedSample:
    """One sample without a problem.

    text: what is said in the target, without the words that ask for it.
    request: the last user text before it, None where there is none; answer: the assistant's own text, likewise.
    targets, references: clips that are learned, and those that are not.
    """

    manifest: Path
    number: int
    speaker: str | None
    text: str
    request: str | None
    answer: str | None
    targets: tuple[Clip, ...]
    references: tuple[Clip, ...]

    @property
    def name(self) -> str:
        return sample_id(self.manifest, self.number)

    def warn(self, kind: str, message: str) -> DataWarning:
        """A warning about this sample."""
        return DataWarning(kind, str(self.manifest), self.number, self.name, message)


def read_samples(preparation: Preparation, layout: AudioLayout) -> list[ReviewedSample]:
    """The samples without a problem, in manifest order."""
    table, good = preparation.samples, preparation.good_samples()
    row_of = dict(zip(table.column("number")[good].tolist(), good.tolist(), strict=True))
    samples = []
    for entry in read_manifest(preparation.manifest):
        row = row_of.get(entry.number)
        if row is None:
            continue
        learned = table.audio_targets(row, layout).tolist()
        clips = list(zip(table.clips(row), learned, strict=True))
        samples.append(
            ReviewedSample(
                manifest=preparation.manifest,
                number=entry.number,
                speaker=table.speaker(row),
                text=_without_request(spoken_text(entry.data)),
                request=next(_texts_of(entry.data, "user"), None),
                answer=next(_texts_of(entry.data, "assistant"), None),
                targets=tuple(clip for clip, is_target in clips if is_target),
                references=tuple(clip for clip, is_target in clips if not is_target),
            )
        )
    return samples


def _without_request(text: str) -> str:
    return text.removeprefix(REQUEST).strip()


def _texts_of(data: dict[str, Any], role: str) -> Iterator[str]:
    """Texts of a role's last message, the last first."""
    contents: list[Any] = [message["content"] for message in data["messages"] if message["role"] == role]
    last = contents[-1] if contents else []
    items = last if isinstance(last, list) else [last]
    for item in reversed(items):
        text = item if isinstance(item, str) else item.get("text")
        if text:
            yield text

"""`data.train` and `data.val`: several manifests, each with its name and its part in the whole."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ds_higgs.config.section import Section
from ds_higgs.config.types import Count, FilePath, Positive, PositiveOrZero, Text


class Source(Section):
    """A manifest among others."""

    manifest: FilePath = Field(description="JSON array or JSON lines of ChatML samples.")
    name: Text | None = Field(None, description="What metrics and reports call it; the file's name if unset.")

    @property
    def title(self) -> str:
        """Its name, given or not."""
        return self.name or self.manifest.stem


class TrainSource(Source):
    """A part of the mixture that is trained on."""

    weight: Positive | None = Field(
        None, description="Share of the samples, against the other weights; all sources have one, or none."
    )
    epochs: Count | None = Field(
        None, description="Passes after which it ends; 1 if unset and without weights, else it goes on."
    )
    prompt_form: Literal["as_is", "boson", "mixed"] | None = Field(None, description="Instead of data.prompt_form.")
    reference: Literal["as_is", "redraw"] | None = Field(None, description="Instead of data.reference.")


class ValSource(Source):
    """One of several validation manifests."""

    weight: PositiveOrZero = Field(1.0, description="Share in the validation losses; 0: shown, and not counted.")


def check_train_sources(sources: Sequence[TrainSource]) -> None:
    """Raises ValueError where names are equal or weights are given to some alone."""
    _check_titles(sources)
    if len({source.weight is None for source in sources}) > 1:
        raise ValueError("some sources have a weight and some have none: expected one for all, or none")


def check_val_sources(sources: Sequence[ValSource]) -> None:
    """Raises ValueError where names are equal or no source counts."""
    _check_titles(sources)
    if not any(source.weight for source in sources):
        raise ValueError("no source has a weight above 0: nothing would be measured")


def is_endless(sources: Sequence[TrainSource]) -> bool:
    """Whether the mixture goes on without end: weights, and no number of passes."""
    return all(source.weight is not None and source.epochs is None for source in sources)


def _check_titles(sources: Sequence[Source]) -> None:
    titles = [source.title for source in sources]
    if repeated := sorted({title for title in titles if titles.count(title) > 1}):
        raise ValueError(f"two sources are named {', '.join(repeated)}: give each a name of its own")

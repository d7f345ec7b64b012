"""Check a manifest's samples and tokenize them, each rank its share, and put the shares together."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import numpy as np
from boson_multimodal.data_types import ChatMLSample
from safetensors.numpy import load, save

from ds_higgs.data.chatml import NO_URL, TokenizedSample, parse_sample, tokenize
from ds_higgs.data.clips import Clip, ClipFinder, clips_from_json, clips_to_json
from ds_higgs.data.manifest import Entry, problem_at, read_manifest
from ds_higgs.data.problems import BadSampleError, Problem
from ds_higgs.data.prompt_forms import FORMS_OF, PromptForm, take_form
from ds_higgs.data.rules import SampleRules, check_fits
from ds_higgs.layout import AudioLayout


@dataclass(frozen=True)
class AnalysedSample:
    """number: its place in the manifest; clips: one per placeholder, in order.

    served: the same in the form that servers send, where an epoch mixes the two; it has the same clips.
    """

    number: int
    tokenized: TokenizedSample
    clips: list[Clip]
    speaker: str | None
    served: TokenizedSample | None = None


@dataclass
class Part:
    """What one rank found in its share of a manifest."""

    samples: list[AnalysedSample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def analyse(entries: Iterable[Entry], manifest: Path, rules: SampleRules, finder: ClipFinder) -> Part:
    """Check and tokenize entries; what is wrong becomes problems, at the place where it was found."""
    part = Part()
    for entry in entries:
        sample, messages = analyse_entry(entry, rules, finder)
        if sample is not None:
            part.samples.append(sample)
        part.problems += [problem_at(manifest, entry.number, error.message, error.expected) for error in messages]
    return part


def analyse_entry(
    entry: Entry, rules: SampleRules, finder: ClipFinder
) -> tuple[AnalysedSample | None, list[BadSampleError]]:
    """The sample, or None and everything that is wrong with it."""
    if entry.error is not None:
        return None, [BadSampleError(entry.error)]
    try:
        sample = parse_sample(entry.data)
        tokenized, *served = [_tokenize_in(form, sample, rules) for form in FORMS_OF[rules.prompt_form]]
    except BadSampleError as error:
        return None, [error]
    clips, errors = _find_clips(tokenized, entry, finder, rules.layout)
    if not errors:
        errors = [error for one in (tokenized, *served) for error in check_fits(one, clips, rules)]
    if errors:
        return None, errors
    return AnalysedSample(entry.number, tokenized, clips, speaker_of(sample), *served), []


def _tokenize_in(form: PromptForm, sample: ChatMLSample, rules: SampleRules) -> TokenizedSample:
    taken = take_form(sample, form, rules.reference_turn)
    return tokenize(taken.sample, rules.tokenizer, rules.layout, references=taken.references)


def share_of(manifest: Path, rank: int, world_size: int) -> Iterator[Entry]:
    """Every `world_size`-th entry of the manifest."""
    for count, entry in enumerate(read_manifest(manifest)):
        if count % world_size == rank:
            yield entry


def speaker_of(sample: ChatMLSample) -> str | None:
    """The speaker, where boson looks for it."""
    if sample.speaker is not None:
        return sample.speaker
    speaker = (sample.misc or {}).get("speaker")
    return None if speaker is None else str(speaker)


@dataclass(frozen=True)
class Parts:
    """The parts of all ranks, put together in manifest order.

    arrays: see `pack_samples`.
    served: the same samples in the form that servers send, where an epoch mixes the two.
    clips: for each sample, one per placeholder.
    """

    arrays: dict[str, np.ndarray]
    clips: list[list[Clip]]
    speakers: list[str | None]
    problems: list[Problem]
    served: dict[str, np.ndarray] | None = None

    def audio_targets(self, index: int, layout: AudioLayout) -> np.ndarray:
        """For each clip of a sample whether it is learned: [num_clips] bool."""
        stop = int(self.arrays["token_counts"][: index + 1].sum())
        span = slice(stop - int(self.arrays["token_counts"][index]), stop)
        return layout.audio_targets(self.arrays["tokens"][span], self.arrays["supervised"][span])


def exchange_parts(part: Part, gather: Callable[[bytes], list[bytes]], *, mixed: bool = False) -> Parts:
    """Give this rank's part to all ranks with `gather`, and put theirs together.

    Args:
        mixed: whether the samples are there in two forms.
    """
    listing = {
        "clips": [clips_to_json(sample.clips) for sample in part.samples],
        "speakers": [sample.speaker for sample in part.samples],
        "problems": [astuple(problem) for problem in part.problems],
    }
    packed = [load(content) for content in gather(save(pack_samples(part.samples)))]
    served = [replace(sample, tokenized=sample.served) for sample in part.samples if sample.served is not None]
    packed_served = [load(content) for content in gather(save(pack_samples(served)))] if mixed else None
    listings = [json.loads(content) for content in gather(json.dumps(listing).encode())]
    clips = [clips_from_json(rows) for found in listings for rows in found["clips"]]
    speakers = [speaker for found in listings for speaker in found["speakers"]]
    order = np.argsort(np.concatenate([arrays["numbers"] for arrays in packed]), kind="stable")
    return Parts(
        arrays=merge_packed(packed, order),
        clips=[clips[index] for index in order],
        speakers=[speakers[index] for index in order],
        problems=sorted(Problem(*row) for found in listings for row in found["problems"]),
        served=None if packed_served is None else merge_packed(packed_served, order),
    )


def pack_samples(samples: Sequence[AnalysedSample]) -> dict[str, np.ndarray]:
    """Flat arrays: numbers [n], token_counts [n], tokens and supervised [all tokens]."""
    tokens = [np.asarray(sample.tokenized.tokens, dtype=np.int32) for sample in samples]
    supervised = [np.asarray(sample.tokenized.supervised, dtype=np.bool_) for sample in samples]
    return {
        "numbers": np.asarray([sample.number for sample in samples], dtype=np.int64),
        "token_counts": np.asarray([len(row) for row in tokens], dtype=np.int64),
        "tokens": np.concatenate([np.zeros(0, np.int32), *tokens]),
        "supervised": np.concatenate([np.zeros(0, np.bool_), *supervised]),
    }


def merge_packed(packed: Sequence[dict[str, np.ndarray]], order: np.ndarray) -> dict[str, np.ndarray]:
    """Concatenate packed samples and bring them into `order` (or keep those that it names)."""
    joined = {name: np.concatenate([part[name] for part in packed]) for name in packed[0]}
    counts = joined["token_counts"]
    starts = np.cumsum(counts) - counts
    new_counts = counts[order]
    new_starts = np.cumsum(new_counts) - new_counts
    gather = np.arange(new_counts.sum()) + np.repeat(starts[order] - new_starts, new_counts)
    return {
        "numbers": joined["numbers"][order],
        "token_counts": new_counts,
        "tokens": joined["tokens"][gather],
        "supervised": joined["supervised"][gather],
    }


def _find_clips(
    tokenized: TokenizedSample, entry: Entry, finder: ClipFinder, layout: AudioLayout
) -> tuple[list[Clip], list[BadSampleError]]:
    clips, errors = [], []
    raw_items = 0
    targets = layout.audio_targets(np.asarray(tokenized.tokens), np.asarray(tokenized.supervised))
    for content, learned in zip(tokenized.clips, targets, strict=True):
        try:
            clips.append(finder.find(content, start=entry.start, end=entry.end, item=raw_items, learned=learned))
        except BadSampleError as error:
            errors.append(error)
        raw_items += content.audio_url in NO_URL
    return clips, errors

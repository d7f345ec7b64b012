"""Check a manifest's samples and tokenize them, each rank its blocks; what was analysed before is taken as it is."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
from boson_multimodal.data_types import ChatMLSample

from ds_higgs.data.arrow_files import TableWriter, bytes_matrix, read_table
from ds_higgs.data.chatml import NO_URL, TokenizedSample, parse_sample, tokenize
from ds_higgs.data.clips import AUDIO_FILE_SCHEMA, Clip, ClipFinder
from ds_higgs.data.codes import check_made_by
from ds_higgs.data.exclusion import Exclusion
from ds_higgs.data.key_index import KEY_BYTES, KeyIndex, join_keys
from ds_higgs.data.manifest import Entry, RawEntry, problem_at, scan_manifest
from ds_higgs.data.problems import BadSampleError, Problem
from ds_higgs.data.prompt_forms import FORMS_OF, PromptForm, take_form
from ds_higgs.data.rules import SampleRules, check_fits
from ds_higgs.data.sample_table import ANALYSED_SCHEMA, AnalysedSample, SampleTable, samples_to_table
from ds_higgs.layout import AudioLayout

BLOCK = 1024  # entries that one rank takes at a time


class Donor:
    """Samples that were analysed before by the same rules, found by their entry's digest.

    Args:
        usable: [samples] bool, those whose audio is what it was.
    """

    def __init__(self, samples: SampleTable, usable: np.ndarray):
        self._samples = samples
        self._rows = np.flatnonzero(usable)
        self._index = KeyIndex(bytes_matrix(samples.table["entry"], KEY_BYTES)[self._rows])
        self._checksums = samples.column("checksum")

    def find(self, entries: Iterable[RawEntry]) -> np.ndarray:
        """[entries] int64, their rows, -1 for those that are to be analysed: new ones, and where a checksum fails."""
        places = self._index.find(join_keys(entry.digest for entry in entries))
        rows = np.where(places < 0, -1, self._rows[places] if len(self._rows) else -1)
        intact = [row < 0 or self._samples.checksum(row) == self._checksums[row] for row in rows.tolist()]
        return np.where(intact, rows, -1)

    def slice(self, first: int, count: int) -> pa.Table:
        """Rows one after another, as ANALYSED_SCHEMA."""
        return self._samples.table.slice(first, count).select(ANALYSED_SCHEMA.names)


@dataclass
class Part:
    """What one rank found in its share of a manifest; the samples themselves lie in files of the draft's folder.

    num_samples: without a problem.
    """

    problems: list[Problem] = field(default_factory=list)
    num_samples: int = 0


class Analysis:
    """One rank's work on a manifest.

    Args:
        donor: samples of before, where there are any.
    """

    def __init__(
        self, manifest: Path, rules: SampleRules, finder: ClipFinder, exclusion: Exclusion, donor: Donor | None
    ):
        self._manifest = manifest
        self._rules = rules
        self._finder = finder
        self._exclusion = exclusion
        self._donor = donor

    def run(self, draft: Path, *, rank: int, world_size: int, stop: Callable[[], bool] = lambda: False) -> Part:
        """Write this rank's samples to the folder `draft`, a record batch a block, and the audio files they name."""
        part = Part()
        samples = TableWriter(draft, ANALYSED_SCHEMA, lambda number: f"part-{rank:05d}-{number:05d}.arrow")
        files = TableWriter(draft, AUDIO_FILE_SCHEMA, lambda number: f"files-{rank:05d}-{number:05d}.arrow")
        with samples, files:
            for number, block in enumerate(_blocks(scan_manifest(self._manifest))):
                if number % world_size != rank:
                    continue
                if stop():
                    break
                batch = self._analyse_block(list(self._exclusion.keep(block)), part)
                part.num_samples += len(batch)
                samples.write(batch)
                files.write(self._finder.take_files())
        return part

    def _analyse_block(self, block: list[RawEntry], part: Part) -> pa.RecordBatch:
        rows = self._donor.find(block) if self._donor is not None and block else np.full(len(block), -1)
        kept: list[RawEntry] = []
        kept_rows: list[int] = []
        analysed: list[AnalysedSample] = []
        for raw, row in zip(block, rows.tolist(), strict=True):
            if row < 0:
                sample, errors = analyse_entry(raw, self._rules, self._finder)
                part.problems += [problem_at(self._manifest, raw.number, one.message, one.expected) for one in errors]
                if sample is None:
                    continue
                analysed.append(sample)
            kept.append(raw)
            kept_rows.append(row)
        pieces = list(_pieces(samples_to_table(analysed), np.asarray(kept_rows, dtype=np.int64), self._donor))
        table = pa.concat_tables(pieces) if pieces else ANALYSED_SCHEMA.empty_table()
        for name in ("number", "start", "end"):  # an entry that was taken may stand elsewhere than it did
            column = pa.array([getattr(raw, name) for raw in kept], pa.int64())
            table = table.set_column(table.schema.get_field_index(name), name, column)
        batches = table.combine_chunks().to_batches()
        return batches[0] if batches else pa.record_batch([[]] * len(ANALYSED_SCHEMA), schema=ANALYSED_SCHEMA)


def _blocks(entries: Iterator[RawEntry]) -> Iterator[list[RawEntry]]:
    while block := list(islice(entries, BLOCK)):
        yield block


def _pieces(analysed: pa.Table, rows: np.ndarray, donor: Donor | None) -> Iterator[pa.Table]:
    """Runs of analysed samples, and of the donor's rows, in order."""
    is_new = rows < 0
    follows = np.where(is_new[1:], is_new[:-1], rows[1:] == rows[:-1] + 1) & (is_new[1:] == is_new[:-1])
    starts = np.concatenate([[0], np.flatnonzero(~follows) + 1]) if len(rows) else np.zeros(0, np.int64)
    done = 0
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=False):
        if is_new[start]:
            yield analysed.slice(done, stop - start)
            done += stop - start
        else:
            assert donor is not None
            yield donor.slice(int(rows[start]), stop - start)


def read_draft(draft: Path, world_size: int) -> tuple[pa.Table, pa.Table]:
    """What all ranks have written: the samples in manifest order, and the audio files (some of them twice).

    Raises:
        FileNotFoundError: another rank's part is not there.
    """
    streams = [_batches(draft, f"part-{rank:05d}-*.arrow") for rank in range(world_size)]
    rounds = zip_longest(*streams)  # block by block, as the ranks took them in turn
    samples = [batch for blocks in rounds for batch in blocks if batch is not None]
    files = [batch for rank in range(world_size) for batch in _batches(draft, f"files-{rank:05d}-*.arrow")]
    return pa.Table.from_batches(samples, ANALYSED_SCHEMA), pa.Table.from_batches(files, AUDIO_FILE_SCHEMA)


def _batches(folder: Path, pattern: str) -> list[pa.RecordBatch]:
    return [batch for path in sorted(folder.glob(pattern)) for batch in read_table(path).to_batches()]


def analyse_entry(
    raw: RawEntry, rules: SampleRules, finder: ClipFinder
) -> tuple[AnalysedSample | None, list[BadSampleError]]:
    """The sample, or None and everything that is wrong with it."""
    entry = raw.parse()
    if entry.error is not None:
        return None, [BadSampleError(entry.error)]
    try:
        sample = parse_sample(entry.data)
        check_made_by(sample, rules.codec)
        tokenized, *served = [_tokenize_in(form, sample, rules) for form in FORMS_OF[rules.prompt_form]]
    except BadSampleError as error:
        return None, [error]
    clips, errors = _find_clips(tokenized, entry, finder, rules.layout)
    if not errors:
        errors = [error for one in (tokenized, *served) for error in check_fits(one, clips, rules)]
    if errors:
        return None, errors
    place = (raw.number, raw.start, raw.end, raw.digest)
    return AnalysedSample(*place, tokenized, clips, speaker_of(sample), *served), []


def _tokenize_in(form: PromptForm, sample: ChatMLSample, rules: SampleRules) -> TokenizedSample:
    taken = take_form(sample, form, rules.reference_turn)
    return tokenize(taken.sample, rules.tokenizer, rules.layout, references=taken.references)


def speaker_of(sample: ChatMLSample) -> str | None:
    """The speaker, where boson looks for it."""
    if sample.speaker is not None:
        return sample.speaker
    speaker = (sample.misc or {}).get("speaker")
    return None if speaker is None else str(speaker)


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

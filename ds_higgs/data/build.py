"""From a manifest to a data set: open what is prepared, else check samples and encode what the cache lacks."""

import logging
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from ds_higgs.data.analysis import Analysis, Donor, read_draft
from ds_higgs.data.audio_changes import KnownFiles, files_of, unchanged_samples
from ds_higgs.data.cache import ClipPlaces, ClipReader, CodeCache, tell_of_former_codes
from ds_higgs.data.clips import ClipFinder, HashMemo
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.deep_check import find_damage
from ds_higgs.data.distinct_clips import DistinctClips, problems_of_clips
from ds_higgs.data.encoding import Encoder, Progress, plan_units, start_helpers
from ds_higgs.data.exclusion import Exclusion
from ds_higgs.data.prepared import PreparedSet, SetMarker, write_set
from ds_higgs.data.problems import BadSampleError, Problem, raise_problems
from ds_higgs.data.ranks import ALONE, RankChannel
from ds_higgs.data.reuse import Reuse
from ds_higgs.data.rules import SampleRules
from ds_higgs.data.sample_table import SampleTable
from ds_higgs.data.statistics import ManifestStatistics, compute_statistics
from ds_higgs.data.variation import check_can_vary, vary
from ds_higgs.errors import UserError

logger = logging.getLogger("ds_higgs")

OnBadSample = Literal["error", "skip"]


def build_dataset(
    manifest: Path,
    *,
    rules: SampleRules,
    cache_dir: Path,
    on_bad_sample: OnBadSample = "error",
    device: str = "cpu",
    ranks: RankChannel = ALONE,
    progress: Progress | None = None,
    needs_audio: bool = True,
    known: KnownFiles | None = None,
) -> HiggsDataset:
    """Check all samples and encode what the cache lacks; every rank returns the same data set.

    Args:
        on_bad_sample: `skip` leaves bad samples out; they are the data set's `rejected`.
        device: where the codec runs, if it is needed.
        progress: called with the number of clips done and of those that the cache lacked.
        needs_audio: whether a manifest of text alone is refused.
        known: see Preparation.

    Raises:
        UserError: with every problem of the manifest (`error`), or no sample is left (`skip`); on every rank.
    """
    preparation = Preparation(manifest, rules=rules, cache_dir=cache_dir, ranks=ranks, known=known)
    preparation.run(on_bad_sample=on_bad_sample, devices=[device], progress=progress, needs_audio=needs_audio)
    return preparation.dataset()


class Preparation:
    """The steps from a manifest to its data set; all ranks take them together.

    A set that was prepared from the same manifest by the same rules is opened, and no other step has anything to do.

    problems: everything found so far, of all ranks.
    samples: all that were analysed, after `analyse`; some of them may have problems by now.
    num_excluded: samples that the rules leave out by name.
    num_clips, num_missing: distinct clips, and those of them that the cache lacked before `encode`.
    """

    def __init__(
        self,
        manifest: Path,
        *,
        rules: SampleRules,
        cache_dir: Path,
        ranks: RankChannel = ALONE,
        known: KnownFiles | None = None,
    ):
        """known: of audio files, asked before one is looked at; what was prepared of others is taken as it was."""
        self.manifest = manifest
        self.problems: list[Problem] = []
        self.samples: SampleTable
        self.num_clips = 0
        self.num_missing = 0
        self.num_excluded = 0
        self._rules = rules
        self._cache_dir = cache_dir
        self._cache = CodeCache(cache_dir, rules.codec.identity)
        self._ranks = ranks
        self._audio_root = rules.audio_root or manifest.parent
        self._reuse = Reuse(manifest, rules, cache_dir=cache_dir, codes=self._cache.folder, ranks=ranks, known=known)
        self._draft: Path
        self._clips: DistinctClips  # of `samples`, after `encode`
        self._files: pa.Table
        self._before: PreparedSet | None = None  # of the same identity, its files and codes as they were
        self._prepared: PreparedSet | None = None

    def run(
        self,
        *,
        on_bad_sample: OnBadSample,
        devices: Sequence[str],
        num_processes: int = 1,
        progress: Progress | None = None,
        needs_audio: bool = True,
    ) -> None:
        """Analyse and encode. A manifest that will be refused is not encoded, but all its audio is checked.

        Raises:
            UserError: with every problem of the manifest, where `on_bad_sample` is "error"; or it is of text alone,
                and `needs_audio`; or references are to be redrawn, and nobody knows whose they are.
        """
        self.analyse()
        check_can_vary(str(self.manifest), self.samples, self._rules)
        refused = on_bad_sample == "error" and bool(self.problems)
        self.encode(devices=[] if refused else devices, num_processes=num_processes, progress=progress)
        if self.problems and on_bad_sample == "error":
            self._ranks.on_first(self._keep_analysis)
            raise_problems(self.manifest, self.problems)
        if needs_audio:
            self.check_audio_to_learn()

    def analyse(self) -> None:
        """Open what is prepared; else check and tokenize all samples that are new, as far as audio headers go."""
        before = self._reuse.find()
        if before is None:
            self._analyse(None)
            return
        changed = self._reuse.find_changed_audio(before)
        if not changed and self._reuse.is_whole(before):
            self._before = before
            if not before.marker.problems:  # else they are looked at again: they may have been mended
                self._take(before)
                return
        self._analyse(Donor(before.samples, unchanged_samples(before.samples, changed)), before.files)

    def encode(self, *, devices: Sequence[str] = (), num_processes: int = 1, progress: Progress | None = None) -> None:
        """Encode what the cache lacks; without a device, only decode and check it.

        Args:
            devices: where codecs run, dealt to the processes in turn.
            num_processes: processes of this rank; the others end with this one.
        """
        if self._prepared is not None:
            return
        codec = self._rules.codec
        clips = self._clips = DistinctClips(self.samples)
        units = plan_units(clips)
        self.num_clips = len(clips)
        missing = np.flatnonzero(self._cache.find(clips.keys) < 0)
        self.num_missing = len(missing)
        if not self._rules.audio_here:
            _check_codes_are_here(clips, missing, self._cache_dir)
        helpers = []
        if devices and self.num_missing:
            self._cache.check_writable(self.num_missing)
            if self._ranks.rank == 0:
                tell_of_former_codes(self._cache_dir, codec.former_identity, self.num_missing)
            find_clips = partial(_clips_of_draft, self._draft, self._ranks.world_size, self._audio_root)
            helpers = start_helpers(num_processes - 1, self.manifest, self._cache_dir, codec, find_clips, devices)
        load_codec = (lambda: codec.load(devices[0])) if devices else None
        encoder = Encoder(
            self._cache,
            self.manifest,
            clips,
            load_codec,
            rate=codec.sampling_rate,
            progress=progress,
            stop=self._ranks.stop_requested,
        )
        encoder.encode_all(units, first=self._ranks.rank * len(units) // self._ranks.world_size)
        for helper in helpers:
            helper.join()
        self._ranks.stop_here()
        failures = _exchange_failures(encoder.failures, self._ranks)
        self.problems += problems_of_clips(self.manifest, self.samples, clips, failures, self._rules.layout)

    def check_audio_to_learn(self) -> None:
        """Raises UserError where all samples without a problem are of text alone."""
        good = self.good_samples()
        if len(good) and not any(self.samples.audio_targets(row, self._rules.layout).any() for row in good.tolist()):
            raise UserError(
                f"{self.manifest}: no audio to learn in any of {len(good)} samples; expected audio items "
                "in assistant messages (`ds-higgs manifest` makes them from recordings and from other tools' lists)"
            )

    def dataset(self) -> HiggsDataset:
        """The data set of all samples without a problem.

        Raises:
            UserError: there is none.
        """
        if not len(self.good_samples()):
            raise_problems(self.manifest, self.problems)
        before = self._before
        if self._prepared is None and before is not None and before.marker.problems == sorted(self.problems):
            self._take(before)
        if self._prepared is None:
            self._take(PreparedSet(Path(self._ranks.on_first(self._write_complete)), self._audio_root))
            self._ranks.tell("opened")  # a folder for this once goes with rank 0's preparation
        assert self._prepared is not None
        layout, names = self._rules.layout, self._prepared.places.names
        reader, mixed = ClipReader(self._cache.folder, names), self._rules.prompt_form == "mixed"
        dataset = HiggsDataset(self.manifest, self._prepared, reader, layout=layout, mixed=mixed)
        return vary(dataset, self._rules, tell=self._ranks.rank == 0)

    def find_damage(self) -> list[tuple[Path, str]]:
        """Files of what was opened that hold something damaged, and what; see `deep_check`."""
        return [] if self._prepared is None else list(find_damage(self._prepared, self._cache.folder))

    @property
    def num_samples(self) -> int:
        """Samples without a problem."""
        return len(self.good_samples())

    def good_samples(self) -> np.ndarray:
        """Rows of `samples` without a problem."""
        bad = [problem.number for problem in self.problems]
        return np.flatnonzero(~np.isin(self.samples.column("number"), bad))

    def statistics(self) -> ManifestStatistics:
        """Of the samples without a problem."""
        return compute_statistics(self.samples, self.good_samples(), self._rules)

    def _take(self, prepared: PreparedSet) -> None:
        self._prepared, self.samples = prepared, prepared.samples
        self.problems = list(prepared.marker.problems)
        self.num_excluded = prepared.marker.num_excluded
        self.num_clips = prepared.marker.num_clips

    def _analyse(self, donor: Donor | None, files: pa.Table | None = None) -> None:
        """Each rank its share; files: those that the donor's samples name."""
        self._draft = Path(self._ranks.on_first(self._begin_draft))
        if not all(self._ranks.tell(self._draft.is_dir())):
            raise UserError(
                f"data.cache_dir: {self._cache_dir} is not one folder for all processes; expected one that they share, "
                "or one on each machine that `ds-higgs prepare` has filled there"
            )
        self._cache.scan()
        memo = HashMemo(self._cache_dir)
        finder = _build_finder(self._cache, memo, self._rules, self._audio_root, self._reuse.known_files())
        exclusion = Exclusion(self.manifest, self._rules.exclude)
        analysis = Analysis(self.manifest, self._rules, finder, exclusion, donor)
        rank, world_size = self._ranks.rank, self._ranks.world_size
        part = analysis.run(self._draft, rank=rank, world_size=world_size, stop=self._ranks.stop_requested)
        memo.save()
        self._ranks.stop_here()
        told = self._ranks.tell([part.num_samples, sorted(exclusion.met), [astuple(one) for one in part.problems]])
        table, found = read_draft(self._draft, world_size)
        assert len(table) == sum(count for count, _, _ in told), "a rank's part is not to be seen"
        self.samples = SampleTable(table, self._audio_root)
        self._files = files_of(self.samples, pa.concat_tables([found, *([] if files is None else [files])]))
        self.problems = [Problem(*one) for _, _, problems in told for one in problems]
        exclusion.check_met([name for _, met, _ in told for name in met])
        self.num_excluded = len(exclusion.names)
        if not self.problems and not len(self.samples):
            raise UserError(f"{self.manifest}: the manifest holds no samples")

    def _begin_draft(self) -> str:
        self._cache.tidy()
        draft = self._reuse.sets.new_draft()
        weakref.finalize(self, shutil.rmtree, draft, ignore_errors=True)
        return str(draft)

    def _write_complete(self) -> str:
        """On rank 0: the folder of the set."""
        self._cache.tidy()
        self._cache.scan()
        return self._write(self._cache.places(self._cache.find(self._clips.keys)), complete=True)

    def _keep_analysis(self) -> str:
        """On rank 0, of a manifest that is refused: what is right of it need not be analysed again."""
        nowhere = np.full(len(self._clips), -1, dtype=np.int32)
        frames = self._rules.codec.count_frames(self._clips.seconds).astype(np.int32)
        return self._write(ClipPlaces([], nowhere, nowhere, frames), complete=False)

    def _write(self, places: ClipPlaces, *, complete: bool) -> str:
        kept = np.zeros(len(self.samples), dtype=np.bool_)
        kept[self.good_samples()] = True
        partial_folder = self._reuse.sets.new_draft()
        try:
            write_set(
                partial_folder,
                self.samples,
                kept=kept,
                places=places.of(self._clips.of_use),
                files=self._files,
                layout=self._rules.layout,
                marker=SetMarker(
                    identity=self._reuse.identity,
                    manifest_path=str(self.manifest.absolute()),
                    complete=complete,
                    num_clips=len(self._clips),
                    num_excluded=self.num_excluded,
                    problems=sorted(self.problems),
                ),
                cache=self._cache.folder,
            )
            return str(self._reuse.sets.publish(partial_folder, self._reuse.identity))
        except OSError as error:
            raise UserError(f"data.cache_dir: {error.filename or self._reuse.sets.root}: {error.strerror}") from None
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)


def _build_finder(
    cache: CodeCache, memo: HashMemo, rules: SampleRules, audio_root: Path, known: KnownFiles | None
) -> ClipFinder:
    return ClipFinder(
        cache,
        memo,
        audio_root=audio_root,
        limits=rules.limits,
        codec=rules.codec,
        known=known,
        may_look=rules.audio_here,
    )


def _check_codes_are_here(clips: DistinctClips, missing: np.ndarray, cache_dir: Path) -> None:
    """Raises UserError where one of the missing clips lies in a file, which may not be looked for."""
    absent = next((path for number in missing.tolist() if (path := clips[number].path)), None)
    if absent is not None:
        raise UserError(
            f"data.audio: elsewhere, but the codes of {len(missing)} of {len(clips)} clips are not in "
            f"{cache_dir} ({absent}); expected the cache folder that was filled where the audio is"
        )


def _exchange_failures(failures: Mapping[str, BadSampleError], ranks: RankChannel) -> dict[str, BadSampleError]:
    """By key, the clips that any rank could not use."""
    content = {key: (error.message, error.expected) for key, error in failures.items()}
    return {key: BadSampleError(*error) for part in ranks.tell(content) for key, error in part.items()}


def _clips_of_draft(draft: Path, world_size: int, audio_root: Path) -> DistinctClips:
    return DistinctClips(SampleTable(read_draft(draft, world_size)[0], audio_root))

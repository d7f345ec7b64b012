"""From a manifest to a data set: check every sample, encode what the cache lacks, each rank its share."""

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

import numpy as np

from ds_higgs.data.analysis import Parts, analyse, exchange_parts, merge_packed, share_of
from ds_higgs.data.cache import CodeCache, codes_folder
from ds_higgs.data.clips import ClipFinder, HashMemo
from ds_higgs.data.conditions import PromptParts
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.encoding import Encoder, Progress, plan_units, start_helpers
from ds_higgs.data.exclusion import Exclusion
from ds_higgs.data.manifest import problem_at
from ds_higgs.data.problems import BadSampleError, Problem, raise_problems
from ds_higgs.data.rules import SampleRules
from ds_higgs.data.statistics import ManifestStatistics, compute_statistics
from ds_higgs.errors import UserError

logger = logging.getLogger("ds_higgs")

OnBadSample = Literal["error", "skip"]


@dataclass(frozen=True)
class RankChannel:
    """This process among those that build a data set together; alone by default.

    gather: gives every rank all ranks' bytes, by rank. It is their own channel: what ranks tell each other lies in no
        folder where another job could find it.
    stop_requested: whether this rank was asked to stop; it then leaves its share where it is.
    stop_here: raises on all ranks where any was asked to stop; they call it together.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[bytes], list[bytes]] = lambda content: [content]
    stop_requested: Callable[[], bool] = lambda: False
    stop_here: Callable[[], None] = lambda: None


def build_dataset(
    manifest: Path,
    *,
    rules: SampleRules,
    cache_dir: Path,
    on_bad_sample: OnBadSample = "error",
    device: str = "cpu",
    ranks: RankChannel = RankChannel(),
    progress: Progress | None = None,
    needs_audio: bool = True,
) -> HiggsDataset:
    """Check all samples and encode what the cache lacks; every rank returns the same data set.

    Args:
        on_bad_sample: `skip` leaves bad samples out; they are the data set's `rejected`.
        device: where the codec runs, if it is needed.
        progress: called with the number of clips done and of those that the cache lacked.
        needs_audio: whether a manifest of text alone is refused.

    Raises:
        UserError: with every problem of the manifest (`error`), or no sample is left (`skip`); on every rank.
    """
    preparation = Preparation(manifest, rules=rules, cache_dir=cache_dir, ranks=ranks)
    preparation.run(on_bad_sample=on_bad_sample, devices=[device], progress=progress, needs_audio=needs_audio)
    return preparation.dataset()


class Preparation:
    """The steps from a manifest to its data set; all ranks take them together.

    problems: everything found so far, of all ranks.
    parts: the samples, after `analyse`.
    num_excluded: samples that the rules leave out by name.
    num_clips, num_missing: distinct clips, and those of them that the cache lacked before `encode`.
    """

    def __init__(
        self,
        manifest: Path,
        *,
        rules: SampleRules,
        cache_dir: Path,
        ranks: RankChannel = RankChannel(),
    ):
        self.manifest = manifest
        self.problems: list[Problem] = []
        self.parts: Parts
        self.num_clips = 0
        self.num_missing = 0
        self.num_excluded = 0
        self._rules = rules
        self._cache_dir = cache_dir
        self._cache = CodeCache(cache_dir, rules.codec.identity)
        self._ranks = ranks

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
                and `needs_audio`.
        """
        self.analyse()
        refused = on_bad_sample == "error" and bool(self.problems)
        self.encode(devices=[] if refused else devices, num_processes=num_processes, progress=progress)
        if self.problems and on_bad_sample == "error":
            raise_problems(self.manifest, self.problems)
        if needs_audio:
            self.check_audio_to_learn()

    def analyse(self) -> None:
        """Check and tokenize all samples, as far as audio headers go."""
        self._scan_cache()
        memo = HashMemo(self._cache_dir)
        audio_root = self._rules.audio_root or self.manifest.parent
        finder = ClipFinder(self._cache, memo, audio_root=audio_root, limits=self._rules.limits)
        exclusion = Exclusion(self.manifest, self._rules.exclude)
        share = exclusion.keep(share_of(self.manifest, self._ranks.rank, self._ranks.world_size))
        entries = takewhile(lambda entry: not self._ranks.stop_requested(), share)
        part = analyse(entries, self.manifest, self._rules, finder)
        memo.save()
        self._ranks.stop_here()
        self.parts = exchange_parts(part, self._ranks.gather, mixed=self._rules.prompt_form == "mixed")
        self.problems = list(self.parts.problems)
        if exclusion.names:
            exclusion.check_met(self._gather_names(exclusion.met))
            self.num_excluded = len(exclusion.names)
        if not self.problems and not self.parts.clips:
            raise UserError(f"{self.manifest}: the manifest holds no samples")

    def encode(self, *, devices: Sequence[str] = (), num_processes: int = 1, progress: Progress | None = None) -> None:
        """Encode what the cache lacks; without a device, only decode and check it.

        Args:
            devices: where codecs run, dealt to the processes in turn.
            num_processes: processes of this rank; the others end with this one.
        """
        codec = self._rules.codec
        units = plan_units(clip for clips in self.parts.clips for clip in clips)
        self._cache.scan()
        helpers = []
        self.num_clips = sum(len(unit.clips) for unit in units)
        self.num_missing = sum(clip.key not in self._cache for unit in units for clip in unit.clips)
        if devices and self.num_missing:
            self._cache.check_writable(self.num_missing)
            self._tell_of_former_codes()
            helpers = start_helpers(num_processes - 1, self.manifest, self._cache_dir, codec, units, devices)
        load_codec = (lambda: codec.load(devices[0])) if devices else None
        encoder = Encoder(
            self._cache,
            self.manifest,
            load_codec,
            rate=codec.sampling_rate,
            progress=progress,
            stop=self._ranks.stop_requested,
        )
        first = self._ranks.rank * len(units) // self._ranks.world_size
        encoder.encode_all(units, first=first)
        for helper in helpers:
            helper.join()
        self._ranks.stop_here()
        self.problems += self._audio_problems(self._exchange_failures(encoder.failures))
        self._cache.scan()

    def check_audio_to_learn(self) -> None:
        """Raises UserError where all samples without a problem are of text alone."""
        arrays = merge_packed([self.parts.arrays], self._good_samples())
        if (
            len(arrays["numbers"])
            and not self._rules.layout.audio_targets(arrays["tokens"], arrays["supervised"]).any()
        ):
            raise UserError(
                f"{self.manifest}: no audio to learn in any of {len(arrays['numbers'])} samples; expected audio items "
                "in assistant messages (`ds-higgs manifest` makes them from recordings and from other tools' lists)"
            )

    def dataset(self) -> HiggsDataset:
        """The data set of all samples without a problem.

        Raises:
            UserError: there is none.
        """
        good = self._good_samples()
        if not len(good):
            raise_problems(self.manifest, self.problems)
        arrays = merge_packed([self.parts.arrays], good)
        clips = [self.parts.clips[index] for index in good]
        layout = self._rules.layout
        dataset = HiggsDataset(
            self.manifest, arrays, clips, cache=self._cache, layout=layout, rejected=sorted(self.problems)
        )
        if self._rules.drops.any():
            dataset.leave_out(self._rules.drops, PromptParts.of(self._rules.tokenizer, layout))
        if self.parts.served is not None:
            dataset.mix_with(merge_packed([self.parts.served], good), clips)
        return dataset

    @property
    def num_samples(self) -> int:
        """Samples without a problem."""
        return len(self._good_samples())

    def statistics(self) -> ManifestStatistics:
        """Of the samples without a problem."""
        return compute_statistics(self.parts, self._good_samples(), self._rules)

    def _good_samples(self) -> np.ndarray:
        bad = [problem.number for problem in self.problems]
        return np.flatnonzero(~np.isin(self.parts.arrays["numbers"], bad))

    def _scan_cache(self) -> None:
        """Look into every shard, each rank into its share; what cannot be mended is left out on all."""
        left = self._cache.remove_corrupt(share=self._ranks.rank, shares=self._ranks.world_size)
        damaged = self._ranks.gather(json.dumps(left).encode())
        self._cache = CodeCache(self._cache_dir, self._rules.codec.identity)
        self._cache.leave_out(name for found in damaged for name in json.loads(found))
        self._cache.scan()

    def _tell_of_former_codes(self) -> None:
        former = self._rules.codec.former_identity
        if former is not None and self._ranks.rank == 0:
            folder = codes_folder(self._cache_dir, former)
            if folder.is_dir():
                logger.warning(
                    "%s: codes of an earlier version, which did not record the codec's semantic model: they are left, "
                    "and %d clips are encoded anew; the folder can be deleted",
                    folder,
                    self.num_missing,
                )

    def _gather_names(self, names: Collection[str]) -> list[str]:
        """Those of all ranks."""
        return [name for part in self._ranks.gather(json.dumps(sorted(names)).encode()) for name in json.loads(part)]

    def _exchange_failures(self, failures: Mapping[str, BadSampleError]) -> dict[str, BadSampleError]:
        """By key, the clips that any rank could not use."""
        content = {key: (error.message, error.expected) for key, error in failures.items()}
        found: dict[str, BadSampleError] = {}
        for part in self._ranks.gather(json.dumps(content).encode()):
            found |= {key: BadSampleError(*error) for key, error in json.loads(part).items()}
        return found

    def _audio_problems(self, failures: Mapping[str, BadSampleError]) -> list[Problem]:
        problems = []
        for index, clips in enumerate(self.parts.clips):
            if any(clip.key in failures for clip in clips):
                targets = self.parts.audio_targets(index, self._rules.layout)
                found = zip(clips, targets, strict=True)
                errors = [failures[clip.key].of(clip.name(learned=on)) for clip, on in found if clip.key in failures]
                number = int(self.parts.arrays["numbers"][index])
                problems += [problem_at(self.manifest, number, error.message, error.expected) for error in errors]
        return list(dict.fromkeys(problems))

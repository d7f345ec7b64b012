"""From a manifest to a data set: check every sample, encode what the cache lacks, each rank its share."""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ds_higgs.data.analysis import (
    Parts,
    analyse,
    merge_packed,
    read_parts,
    share_of,
    write_part,
)
from ds_higgs.data.cache import CodeCache
from ds_higgs.data.clips import ClipFinder, HashMemo
from ds_higgs.data.dataset import HiggsDataset
from ds_higgs.data.encoding import Encoder, Progress, plan_units, start_helpers
from ds_higgs.data.manifest import problem_at
from ds_higgs.data.problems import BadSampleError, Problem, raise_problems
from ds_higgs.data.rules import SampleRules
from ds_higgs.data.statistics import ManifestStatistics, compute_statistics
from ds_higgs.errors import UserError
from ds_higgs.files import write_atomically

OnBadSample = Literal["error", "skip"]

OLD_PARTS_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Ranks:
    """This process among those that build a data set together; alone by default."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = lambda: None


def build_dataset(
    manifest: Path,
    *,
    rules: SampleRules,
    cache_dir: Path,
    on_bad_sample: OnBadSample = "error",
    device: str = "cpu",
    ranks: Ranks = Ranks(),
    progress: Progress | None = None,
) -> HiggsDataset:
    """Check all samples and encode what the cache lacks; every rank returns the same data set.

    Args:
        on_bad_sample: `skip` leaves bad samples out; they are the data set's `rejected`.
        device: where the codec runs, if it is needed.
        progress: called with the number of clips done and of those that the cache lacked.

    Raises:
        UserError: with every problem of the manifest (`error`), or no sample is left (`skip`); on every rank.
    """
    preparation = Preparation(manifest, rules=rules, cache_dir=cache_dir, ranks=ranks)
    preparation.run(on_bad_sample=on_bad_sample, devices=[device], progress=progress)
    return preparation.dataset()


class Preparation:
    """The steps from a manifest to its data set; all ranks take them together.

    Ranks tell each other what they found through files in the cache folder, so a barrier is all they need.

    problems: everything found so far, of all ranks.
    parts: the samples, after `analyse`.
    num_clips, num_missing: distinct clips, and those of them that the cache lacked before `encode`.
    """

    def __init__(
        self,
        manifest: Path,
        *,
        rules: SampleRules,
        cache_dir: Path,
        ranks: Ranks = Ranks(),
    ):
        self.manifest = manifest
        self.problems: list[Problem] = []
        self.parts: Parts
        self.num_clips = 0
        self.num_missing = 0
        self._rules = rules
        self._cache_dir = cache_dir
        self._cache = CodeCache(cache_dir, rules.codec.identity)
        self._ranks = ranks
        self._folder = _parts_folder(cache_dir, manifest, rules.codec.identity, ranks.world_size)

    def run(
        self,
        *,
        on_bad_sample: OnBadSample,
        devices: Sequence[str],
        num_processes: int = 1,
        progress: Progress | None = None,
    ) -> None:
        """Analyse and encode. A manifest that will be refused is not encoded, but all its audio is checked.

        Raises:
            UserError: with every problem of the manifest, where `on_bad_sample` is "error".
        """
        self.analyse()
        refused = on_bad_sample == "error" and bool(self.problems)
        self.encode(devices=[] if refused else devices, num_processes=num_processes, progress=progress)
        if self.problems and on_bad_sample == "error":
            raise_problems(self.manifest, self.problems)

    def analyse(self) -> None:
        """Check and tokenize all samples, as far as audio headers go."""
        self._cache.remove_corrupt(share=self._ranks.rank, shares=self._ranks.world_size)
        self._ranks.barrier()
        self._cache = CodeCache(self._cache_dir, self._rules.codec.identity)
        self._cache.scan()
        memo = HashMemo(self._cache_dir)
        audio_root = self._rules.audio_root or self.manifest.parent
        finder = ClipFinder(self._cache, memo, audio_root=audio_root, limits=self._rules.limits)
        entries = share_of(self.manifest, self._ranks.rank, self._ranks.world_size)
        part = analyse(entries, self.manifest, self._rules, finder)
        memo.save()
        write_part(self._folder, self._ranks.rank, part)
        self._ranks.barrier()
        self.parts = read_parts(self._folder, self._ranks.world_size)
        self.problems = list(self.parts.problems)
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
            helpers = start_helpers(num_processes - 1, self.manifest, self._cache_dir, codec, units, devices)
        load_codec = (lambda: codec.load(devices[0])) if devices else None
        encoder = Encoder(self._cache, self.manifest, load_codec, rate=codec.sampling_rate)
        encoder.encode_all(units, first=self._ranks.rank * len(units) // self._ranks.world_size, progress=progress)
        for helper in helpers:
            helper.join()
        self._share_failures(encoder.failures)
        self.problems += self._audio_problems()

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
        return HiggsDataset(
            self.manifest, arrays, clips, cache=self._cache, layout=layout, rejected=sorted(self.problems)
        )

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

    def _share_failures(self, failures: Mapping[str, BadSampleError]) -> None:
        content = {key: (error.message, error.expected) for key, error in failures.items()}
        write_atomically(self._folder / f"failures-{self._ranks.rank}.json", json.dumps(content).encode())
        self._ranks.barrier()
        self._cache.scan()

    def _audio_problems(self) -> list[Problem]:
        failures: dict[str, tuple[str, str | None]] = {}
        for rank in range(self._ranks.world_size):
            failures |= json.loads((self._folder / f"failures-{rank}.json").read_text("utf-8"))
        problems = []
        for number, clips in zip(self.parts.arrays["numbers"], self.parts.clips, strict=True):
            for key in dict.fromkeys(clip.key for clip in clips if clip.key in failures):
                problems.append(problem_at(self.manifest, int(number), *failures[key]))
        return problems


def _parts_folder(cache_dir: Path, manifest: Path, codec_identity: str, world_size: int) -> Path:
    """Where the ranks of this run meet; folders that no run has used for a day are deleted."""
    parts = cache_dir / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    for old in parts.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process deletes it too
            if time.time() - old.stat().st_mtime > OLD_PARTS_SECONDS:
                shutil.rmtree(old)
    name = hashlib.sha256(f"{manifest.resolve()}\n{codec_identity}\n{world_size}".encode()).hexdigest()[:16]
    folder = parts / name
    folder.mkdir(exist_ok=True)
    return folder

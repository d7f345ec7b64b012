"""Encode one share of a manifest's audio into a folder of its own: no other process writes there, and no lock is taken.

A share that was killed is started again: what it has encoded stays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ds_higgs.data.cache import CodeCache
from ds_higgs.data.clips import ClipFinder, HashMemo
from ds_higgs.data.encoding import Encoder, Progress, plan_units, start_helpers
from ds_higgs.data.exclusion import Exclusion
from ds_higgs.data.problems import BadSampleError, Problem, raise_problems
from ds_higgs.data.rules import SampleRules
from ds_higgs.data.shares.copying import copy_clips
from ds_higgs.data.shares.dealing import Dealer, Share
from ds_higgs.data.shares.folders import ShareMarker, checksum_of, identify_shares, share_folder
from ds_higgs.data.shares.found_audio import FoundAudio, write_found
from ds_higgs.files import sync_folder


class ShareMaker:
    """One share's work.

    num_clips, num_missing: its distinct clips, and those of them that were not encoded before, after `run`.
    problems: of its audio, and of entries that are no samples, whosesoever.
    """

    def __init__(self, manifest: Path, share: Share, *, rules: SampleRules, cache_dir: Path):
        self.problems: list[Problem] = []
        self.num_clips = 0
        self.num_missing = 0
        self._identity = identify_shares(manifest, rules)
        self.folder = share_folder(cache_dir, self._identity, share)
        self._manifest = manifest
        self._share = share
        self._rules = rules
        self._cache_dir = cache_dir
        self._audio_root = rules.audio_root or manifest.parent
        self._cache = CodeCache(self.folder, rules.codec.identity, alone=True)

    def run(
        self,
        *,
        devices: Sequence[str],
        skip_bad: bool = False,
        num_processes: int = 1,
        progress: Progress | None = None,
    ) -> None:
        """Encode what the share lacks.

        Args:
            devices: where codecs run, dealt to the processes in turn.
            skip_bad: whether audio that cannot be used is left out; else all is checked, and then nothing is encoded.
            num_processes: of this share, at work on this machine.

        Raises:
            UserError: with every problem, unless `skip_bad`.
        """
        self._cache.tidy()
        dealer = Dealer(self._manifest, self._share.count, Exclusion(self._manifest, self._rules.exclude))
        names = self._find_audio(dealer)
        found = FoundAudio(self.folder, names, self._audio_root)
        self.num_clips = len(found)
        ShareMarker(self._identity, complete=False, num_clips=len(found)).write(self.folder)
        refused = not skip_bad and bool(dealer.problems or found.problems(self._manifest, {}))
        failures = self._encode(found, names, [] if refused else devices, num_processes, progress)
        self.problems = dealer.problems + found.problems(self._manifest, failures)
        if self.problems and not skip_bad:
            raise_problems(self._manifest, self.problems)
        self._finish(ShareMarker(self._identity, complete=True, num_clips=len(found)), names, failures)

    def _find_audio(self, dealer: Dealer) -> list[str]:
        """Look at every file of the share; names of the tables of what is found."""
        memo = HashMemo(self.folder)
        finder = ClipFinder(
            self._cache, memo, audio_root=self._audio_root, limits=self._rules.limits, codec=self._rules.codec
        )
        return write_found(self.folder, self._manifest, dealer.own_items(self._share), finder, memo.save)

    def _encode(
        self,
        found: FoundAudio,
        names: Sequence[str],
        devices: Sequence[str],
        num_processes: int,
        progress: Progress | None,
    ) -> dict[str, BadSampleError]:
        """By key, the clips that could not be decoded."""
        codec = self._rules.codec
        copy_clips(CodeCache(self._cache_dir, codec.identity), self._cache, found.keys)
        self.num_missing = int((self._cache.find(found.keys) < 0).sum())
        units, helpers = plan_units(found), []
        if devices and self.num_missing:
            self._cache.check_writable(self.num_missing)
            find_clips = partial(FoundAudio, self.folder, names, self._audio_root)
            helpers = start_helpers(
                num_processes - 1, self._manifest, self.folder, codec, find_clips, devices, apart=True
            )
        encode = partial(
            Encoder,
            self._cache,
            self._manifest,
            found,
            (lambda: codec.load(devices[0])) if devices else None,
            rate=codec.sampling_rate,
        )
        encoder = encode(progress=progress)
        encoder.encode_all(units[:: len(helpers) + 1])
        if helpers:
            for helper in helpers:
                helper.join()
            self._cache.scan()
            encoder = encode()  # for what cannot be used, and what a helper that was killed has left
            encoder.encode_all(units)
        return encoder.failures

    def _finish(self, marker: ShareMarker, names: Sequence[str], failures: Mapping[str, BadSampleError]) -> None:
        self._cache.tidy()
        codes = [str(path.relative_to(self.folder)) for path in sorted(self._cache.folder.glob("clips-*.arrow"))]
        sync_folder(self.folder)
        replace(
            marker,
            failures={key: (error.message, error.expected) for key, error in failures.items()},
            sizes={name: (self.folder / name).stat().st_size for name in [*names, *codes]},
            checksums={name: checksum_of(self.folder / name) for name in names},
        ).write(self.folder)

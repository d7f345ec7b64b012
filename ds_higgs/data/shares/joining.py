"""Shares of a manifest, from however many folders, checked and joined into one code cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ds_higgs.data.audio_changes import KnownFiles
from ds_higgs.data.cache import CodeCache
from ds_higgs.data.clips import AUDIO_FILE_SCHEMA
from ds_higgs.data.exclusion import Exclusion
from ds_higgs.data.key_index import KeyIndex, join_keys
from ds_higgs.data.rules import SampleRules
from ds_higgs.data.shares.copying import copy_clips
from ds_higgs.data.shares.dealing import Dealer, Share
from ds_higgs.data.shares.folders import ShareMarker, checksum_of, find_shares, identify_shares
from ds_higgs.data.shares.found_audio import FoundAudio
from ds_higgs.errors import UserError


@dataclass(frozen=True)
class MadeShare:
    """A share that is whole, as far as its sizes tell."""

    share: Share
    folder: Path
    marker: ShareMarker

    def found(self, audio_root: Path) -> FoundAudio:
        """Its audio items."""
        return FoundAudio(self.folder, list(self.marker.checksums), audio_root)


class ShareJoin:
    """The shares of one manifest.

    Args:
        roots: cache folders in which shares were made.

    Raises:
        UserError: shares are missing, unfinished or damaged; it names them all.
    """

    def __init__(self, manifest: Path, *, rules: SampleRules, roots: Sequence[Path]):
        self._manifest = manifest
        self._rules = rules
        self._audio_root = rules.audio_root or manifest.parent
        self.shares = self._find(roots)

    def take_in(self, cache_dir: Path) -> int:
        """Copy to the code cache what it lacks of the shares' clips; how many clips they have.

        Raises:
            UserError: some are damaged; it names their shares.
        """
        cache = CodeCache(cache_dir, self._rules.codec.identity)
        problems, total = [], 0
        for made in self.shares:
            keys = _good_keys(made.found(self._audio_root), made.marker)
            copy_clips(CodeCache(made.folder, self._rules.codec.identity), cache, keys)
            lacking = int((cache.find(keys) < 0).sum())
            total += len(keys)
            if lacking:
                problems.append(_cure(made.share, f"{made.folder}: {lacking} of {len(keys)} clips are damaged"))
        if problems:
            raise UserError.from_problems(f"--join: {self._manifest}:", problems)
        return total

    def known_files(self) -> KnownFiles:
        """What the shares have seen of the audio, so that nobody has to look at it."""
        files, errors = [AUDIO_FILE_SCHEMA.empty_table()], {}
        for made in self.shares:
            found = made.found(self._audio_root)
            files.append(found.files)
            for row, error in found.unusable(made.marker.errors):
                errors[row["path"], row["offset"], row["duration"]] = error
        return KnownFiles(pa.concat_tables(files), errors)

    def _find(self, roots: Sequence[Path]) -> list[MadeShare]:
        identity = identify_shares(self._manifest, self._rules)
        begun: dict[int, dict[int, list[Path]]] = {}  # by count, then number
        for root in roots:
            for share, folder in find_shares(root, identity):
                begun.setdefault(share.count, {}).setdefault(share.number, []).append(folder)
        problems: list[str] = []
        for count in sorted(begun, key=lambda count: count - len(begun[count])):
            of_count = [self._find_one(Share(number + 1, count), identity, begun[count]) for number in range(count)]
            shares = [found for found in of_count if isinstance(found, MadeShare)]
            if len(shares) == count:
                return shares
            problems = problems or self._describe([found for found in of_count if not isinstance(found, MadeShare)])
        where = ", ".join(str(root) for root in roots)
        if not problems:
            raise UserError(
                f"--join: no shares of {self._manifest} in {where}; expected folders in which all of "
                "`ds-higgs prepare --share 1/N` to N/N were made with this manifest, codec and limits"
            )
        raise UserError.from_problems(f"--join: {self._manifest}: not all shares are in {where}:", problems)

    def _find_one(
        self, share: Share, identity: str, begun: dict[int, list[Path]]
    ) -> "MadeShare | tuple[Share, str | None]":
        """The share, or what is wrong with it; None where nobody has begun it."""
        reason = None
        for folder in begun.get(share.number, []):
            marker = ShareMarker.read(folder)
            reason = self._what_is_wrong(folder, marker, identity)
            if reason is None:
                assert marker is not None
                return MadeShare(share, folder, marker)
        return share, reason

    def _what_is_wrong(self, folder: Path, marker: ShareMarker | None, identity: str) -> str | None:
        if marker is None or marker.identity != identity:
            return f"{folder}: stopped before its clips were counted"
        if not marker.complete:
            cache = CodeCache(folder, self._rules.codec.identity)
            cache.scan()
            return f"{folder}: unfinished, {len(cache)} of {marker.num_clips} clips are encoded"
        for name, size in marker.sizes.items():
            path = folder / name
            if not path.exists() or path.stat().st_size != size:
                return f"{path}: missing, or of another size than it was written with"
            if name in marker.checksums and checksum_of(path) != marker.checksums[name]:
                return f"{path}: fails its checksum"
        return None

    def _describe(self, missing: Sequence[tuple[Share, str | None]]) -> list[str]:
        absent = [share for share, reason in missing if reason is None]
        counts = self._count_items(absent) if absent else {}
        return [
            _cure(share, f"not there: {counts[share.number]} clips" if reason is None else reason)
            for share, reason in missing
        ]

    def _count_items(self, shares: Sequence[Share]) -> dict[int, int]:
        """By number, the audio items that each of the shares, which are of one count, has to encode."""
        dealer = Dealer(self._manifest, shares[0].count, Exclusion(self._manifest, self._rules.exclude))
        return {number: len(items) for number, items in dealer.deal({share.number for share in shares}).items()}


def _good_keys(found: FoundAudio, marker: ShareMarker) -> np.ndarray:
    failed = KeyIndex(join_keys(map(bytes.fromhex, marker.failures)))
    return found.keys[failed.find(found.keys) < 0]


def _cure(share: Share, what: str) -> str:
    return f"share {share}: {what}; `ds-higgs prepare --share {share}` with the same configuration makes it"

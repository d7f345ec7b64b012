"""What was prepared before: find it, and tell what of it still holds; all ranks together."""

import logging
import os
import shutil
import tempfile
import weakref
from dataclasses import astuple
from pathlib import Path
from typing import Any

from ds_higgs.data.arrow_files import DamagedFileError
from ds_higgs.data.audio_changes import KnownFiles, look_at_files
from ds_higgs.data.clips import AUDIO_FILE_SCHEMA
from ds_higgs.data.identity import Identity, identify
from ds_higgs.data.prepared import PreparedSet, PreparedSets, read_files
from ds_higgs.data.ranks import RankChannel
from ds_higgs.data.rules import SampleRules

logger = logging.getLogger("ds_higgs")


class Reuse:
    """The sets of one manifest and of its like.

    identity: of the set that is wanted; sets: where it goes. Both are known after `find`.

    Args:
        codes: folder of the code cache.
        known: of audio files, that nobody is to look at again.
    """

    def __init__(
        self,
        manifest: Path,
        rules: SampleRules,
        *,
        cache_dir: Path,
        codes: Path,
        ranks: RankChannel,
        known: KnownFiles | None = None,
    ):
        self.identity: Identity
        self.sets: PreparedSets
        self._manifest = manifest
        self._rules = rules
        self._cache_dir = cache_dir
        self._codes = codes
        self._ranks = ranks
        self._known = known
        self._audio_root = rules.audio_root or manifest.parent

    def find(self) -> PreparedSet | None:
        """The set itself, else one whose samples may be taken, else none: the same on all ranks."""
        told = self._ranks.on_first(self._look)
        self.identity, self.sets = Identity(*told["identity"]), PreparedSets(Path(told["root"]))
        folder, own = told["found"] and Path(told["found"]), PreparedSets(self._cache_dir)
        if folder and (folder.parent != own.root or not folder.is_dir()):  # this machine has a cache of its own
            folder = own.find(self.identity)
        found = None
        try:
            found = PreparedSet(folder, self._audio_root) if folder else None
        except (OSError, DamagedFileError) as error:
            logger.warning("%s: damaged (%s): its samples are analysed again", folder, error)
        first, *others = self._ranks.tell(found and found.marker.checksums["checksum"])
        return found if first is not None and all(other == first for other in others) else None

    def find_changed_audio(self, before: PreparedSet) -> frozenset[str]:
        """Paths of the audio files that are not what they were, each rank looking at its share."""
        if self._known is not None:
            return self._known.changed(before.files)
        if not self._rules.audio_here:
            return frozenset()
        rank, world_size = self._ranks.rank, self._ranks.world_size
        looked = look_at_files(before.files, self._audio_root, self._cache_dir, share=rank, shares=world_size)
        told = self._ranks.tell([looked.changed, looked.num_missing])
        missing = sum(count for _, count in told)
        if missing and rank == 0 and before.marker.identity.manifest == self.identity.manifest:
            logger.info("%s: %d audio files are not here; their codes are used", self._manifest, missing)
        return frozenset(path for changed, _ in told for path in changed)

    def known_files(self) -> KnownFiles | None:
        """What is known of the audio without a look; where it is elsewhere, from any set of the manifest."""
        if self._known is not None or self._rules.audio_here:
            return self._known
        folder = PreparedSets(self._cache_dir).find_of_manifest(self.identity)
        return KnownFiles(AUDIO_FILE_SCHEMA.empty_table() if folder is None else read_files(folder), {})

    def is_whole(self, before: PreparedSet) -> bool:
        """Whether it is the set that is wanted, and all its files and codes are there."""
        marker = before.marker
        is_wanted = marker.complete and marker.identity == self.identity
        whole = is_wanted and not before.is_suspect() and before.has_codes(self._codes)
        return all(self._ranks.tell(whole))

    def _look(self) -> dict[str, Any]:
        identity = identify(self._manifest, self._rules)
        sets = PreparedSets(self._cache_dir)
        found = sets.find(identity) or sets.find_donor(identity, self._manifest)
        root = self._cache_dir
        if not os.access(root, os.W_OK):  # another user's: what is made here is for this once
            root = Path(tempfile.mkdtemp(prefix="ds_higgs-prepared-"))
            weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
        return {"identity": astuple(identity), "root": str(root), "found": found and str(found)}

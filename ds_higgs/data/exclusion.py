"""`data.exclude`: a list of samples, by the names that messages and `ds-higgs inspect` give them, to be left out."""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ds_higgs.data.manifest import RawEntry, sample_id
from ds_higgs.errors import UserError
from ds_higgs.files import read_text_lines


def read_exclude_list(path: Path, manifests: Collection[Path]) -> frozenset[str]:
    """The names in the file, one a line; blank lines and those that begin with # say nothing.

    Raises:
        UserError: the file cannot be read, or with every line that is no sample's name of one of the manifests.
    """
    known = {manifest.name for manifest in manifests}
    names, problems = set(), []
    for number, line in enumerate(read_text_lines(path, "data.exclude"), start=1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        file, _, place = name.rpartition(":")
        if file in known and place.isdecimal():
            names.add(name)
        else:
            problems.append(f"{path.name}:{number}: {name!r}")
    if problems:
        shown = " or ".join(f"{name}:3" for name in sorted(known))
        raise UserError.from_problems(f"data.exclude: {path}: expected samples' names such as {shown}", problems)
    return frozenset(names)


class Exclusion:
    """Leaves a manifest's named samples out while it is read.

    names: of this manifest's samples that are to be left out; met: those that were.
    """

    def __init__(self, manifest: Path, names: Collection[str]):
        self.names = {name for name in names if name.rpartition(":")[0] == manifest.name}
        self.met: set[str] = set()
        self._manifest = manifest

    def keep(self, entries: Iterable[RawEntry]) -> Iterator[RawEntry]:
        """The entries that are not left out."""
        for entry in entries:
            name = sample_id(self._manifest, entry.number)
            if name in self.names:
                self.met.add(name)
            else:
                yield entry

    def check_met(self, met: Collection[str]) -> None:
        """Raises UserError naming the samples that are not among `met`: those of all ranks."""
        if absent := sorted(self.names - set(met)):
            raise UserError.from_problems(
                f"data.exclude: {len(absent)} samples are not in {self._manifest}; was it made anew?", absent[:50]
            )

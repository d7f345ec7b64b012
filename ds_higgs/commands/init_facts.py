"""What the data and the machine are like, as far as settings depend on it."""

import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from boson_multimodal.data_types import AudioContent, ChatMLSample, TextContent

from ds_higgs.data.audio import AudioLimits, AudioSource, Segment, check_file, check_header, decode_base64
from ds_higgs.data.chatml import NO_URL, parse_sample
from ds_higgs.data.manifest import read_manifest, sample_id
from ds_higgs.data.problems import BadSampleError
from ds_higgs.errors import UserError

MAX_MEASURED = 500  # samples whose audio is opened; the hours of all are reckoned from their mean
ANY_LENGTH = AudioLimits(min_seconds=0.0, max_seconds=float("inf"))


@dataclass(frozen=True)
class DataFacts:
    """Of a manifest. seconds: of the targets that were measured. scripts: shares of the letters, most first."""

    num_samples: int
    speakers: int
    scripts: dict[str, float]
    seconds: list[float]

    @property
    def hours(self) -> float:
        return self.num_samples * self.mean_seconds / 3600

    @property
    def mean_seconds(self) -> float:
        return sum(self.seconds) / max(1, len(self.seconds))

    def describe(self) -> list[str]:
        """Lines for people."""
        scripts = ", ".join(f"{name} {share:.0%}" for name, share in self.scripts.items()) or "no letters"
        longest = max(self.seconds, default=0.0)
        return [
            f"{self.num_samples} samples, about {self.hours:.1f} h, {self.speakers or 'no named'} speakers",
            f"targets of {self.mean_seconds:.1f} s on average, up to {longest:.1f} s; letters: {scripts}",
        ]


def look_at(manifest: Path, *, audio_root: Path | None = None) -> DataFacts:
    """Read every sample of `manifest`, and the headers of some of its audio.

    Raises:
        UserError: a sample cannot be read; `ds-higgs validate` then lists all of them.
    """
    speakers: set[str] = set()
    letters: Counter[str] = Counter()
    targets: list[list[AudioContent]] = []
    for entry in read_manifest(manifest):
        try:
            sample = parse_sample(entry.data)
        except BadSampleError as error:
            raise UserError(f"{sample_id(manifest, entry.number)}: {entry.error or error}") from None
        if sample.speaker:
            speakers.add(sample.speaker)
        items = list(_learned(sample))
        letters.update(name for item in items if isinstance(item, TextContent) for name in _scripts(item.text))
        targets.append([item for item in items if isinstance(item, AudioContent)])
    root = audio_root or manifest.parent
    every = max(1, len(targets) // MAX_MEASURED)
    seconds = [_seconds(item, root, manifest) for items in targets[::every] for item in items]
    total = sum(letters.values())
    shares = {name: count / total for name, count in letters.most_common(3)}
    return DataFacts(len(targets), len(speakers), shares, seconds)


def look_at_gpus() -> tuple[float, int]:
    """The memory of the smallest GPU in GiB, and how many there are."""
    import torch

    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return (min(sizes) / 2**30 if sizes else 0.0), len(sizes)


def _learned(sample: ChatMLSample) -> Iterator[TextContent | AudioContent]:
    for turn, message in enumerate(sample.messages):
        if message.role == "assistant" and turn >= (sample.start_index or 0):
            yield from message.content


def _scripts(text: str) -> Iterator[str]:
    """The script of every letter: "Arabic", "Latin"."""
    for letter in text:
        if letter.isalpha():
            yield unicodedata.name(letter, "other").split()[0].capitalize()


def _seconds(item: AudioContent, root: Path, manifest: Path) -> float:
    try:
        source: AudioSource = root / item.audio_url
        if item.audio_url in NO_URL:
            source = decode_base64(item.raw_audio or "")
        else:
            check_file(root / item.audio_url)
        return check_header(source, Segment(item.offset or 0.0, item.duration), ANY_LENGTH)
    except BadSampleError as error:
        raise UserError(f"{manifest}: {item.audio_url}: {error}") from None

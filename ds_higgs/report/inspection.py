"""The page of `ds-higgs inspect`: samples with players and outlines, the worst first, to search and to leave out."""

from collections import Counter
from pathlib import Path
from typing import Any

from ds_higgs.commands.inspect import InspectedSample, Inspection
from ds_higgs.data.audio import read_frames
from ds_higgs.data.clips import Clip
from ds_higgs.data.review.kinds import KINDS
from ds_higgs.report.page import render, write_page
from ds_higgs.report.players import embed_waveform

MAX_SAMPLES = 1000  # on a page: beyond, a browser takes seconds to open it
MAX_PROBLEMS = 50
SCRIPTS = ("elements.js", "inspection.js")


def build_inspection(inspection: Inspection, out: Path, *, audio_bytes: int) -> None:
    """Write the page to the file `out`.

    Args:
        audio_bytes: room for players, in the page; the worst samples get theirs first.

    Raises:
        UserError: it cannot be written.
    """
    shown = inspection.samples[:MAX_SAMPLES]
    players = _Players(audio_bytes)
    values = {
        "manifests": [str(path) for path in inspection.manifests],
        "num_samples": len(inspection.samples),
        "num_excluded": inspection.num_excluded,
        "seconds": inspection.seconds,
        "speakers": inspection.speakers(),
        "kinds": _collect_kinds(inspection),
        "general": [{"kind": one.kind, "sample": one.sample, "message": one.message} for one in inspection.general],
        "problems": [str(problem) for problem in inspection.problems[:MAX_PROBLEMS]],
        "num_problems": len(inspection.problems),
        "samples": [_collect_sample(one, inspection, players) for one in shown],
        "audio": players.embedded,
    }
    title = " and ".join(path.name for path in inspection.manifests)
    write_page(out, render(values, title=title, scripts=SCRIPTS))


def _collect_kinds(inspection: Inspection) -> list[dict[str, Any]]:
    counts = Counter(warning.kind for warning in inspection.warnings)
    return [
        {"name": name, "title": kind.title, "advice": kind.advice, "weight": kind.weight, "count": counts[name]}
        for name, kind in KINDS.items()
        if counts[name]
    ]


def _collect_sample(one: InspectedSample, inspection: Inspection, players: "_Players") -> dict[str, Any]:
    """A sample as the page's script reads it."""
    return {
        "name": one.sample.name,
        "speaker": one.sample.speaker,
        "text": one.sample.text,
        "warnings": [{"kind": warning.kind, "message": warning.message} for warning in one.warnings],
        "score": one.score,
        "clips": [
            _clip(clip, what, one, inspection, players)
            for what, clips in (("Target", one.sample.targets), ("Reference", one.sample.references))
            for clip in clips
        ],
    }


def _clip(clip: Clip, what: str, one: InspectedSample, inspection: Inspection, players: "_Players") -> dict[str, Any]:
    sound = inspection.sounds[clip.key]
    return {
        "what": what,
        "seconds": round(sound.seconds, 2),
        "level": round(sound.level_dbfs, 1),
        "noise": round(sound.level_dbfs - sound.noise_dbfs, 1),
        "rate": sound.rate,
        "outline": sound.outline,
        "file": clip.path,
        "audio": players.embed(clip, one.sample.manifest),
    }


class _Players:
    """Embeds clips until the room is used up; one that several samples use is there once.

    embedded: the clips' audio as data URIs; their places there are what samples hold.
    """

    def __init__(self, room: int):
        self.embedded: list[str] = []
        self._room = room
        self._places: dict[str, int | None] = {}

    def embed(self, clip: Clip, manifest: Path) -> int | None:
        """The clip's place among the embedded; None where there is no room for it."""
        if clip.key not in self._places:
            self._places[clip.key] = self._embed(clip, manifest) if self._room > 0 else None
        return self._places[clip.key]

    def _embed(self, clip: Clip, manifest: Path) -> int | None:
        samples, rate = read_frames(clip.source(manifest), clip.segment)
        uri = embed_waveform(samples.mean(axis=1), rate)
        self._room -= len(uri)
        if self._room < 0:
            return None
        self.embedded.append(uri)
        return len(self.embedded) - 1

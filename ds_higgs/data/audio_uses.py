"""Where the clips of samples stand in their prompts, and which tokens say what they say: of all samples at once."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from ds_higgs.data.conditions import ROLES, PromptParts
from ds_higgs.data.sample_table import SampleTable

_USER, _ASSISTANT = ROLES.index("user"), ROLES.index("assistant")


@dataclass(frozen=True)
class AudioUses:
    """One entry a use of a clip, in the order of samples and of their placeholders.

    row: of its sample; place: among the sample's clips.
    is_input: whether it stands for <|AUDIO|> rather than <|AUDIO_OUT|>.
    is_target: learned; is_reference: as `conditions.PromptParts` has it; else a spoken question, say.
    is_single: the only audio of its message, so that the text beside it is its own.
    can_change: what it says, if anything, stands once in the prompt, and in no phrase.
    text_start, text_stop: the tokens of its sample that say what it says; equal where nobody knows.
    """

    row: np.ndarray
    place: np.ndarray
    is_input: np.ndarray
    is_target: np.ndarray
    is_reference: np.ndarray
    is_single: np.ndarray
    can_change: np.ndarray
    text_start: np.ndarray
    text_stop: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    @property
    def text_length(self) -> np.ndarray:
        """Tokens that say what each says."""
        return self.text_stop - self.text_start


def find_audio_uses(samples: SampleTable, parts: PromptParts, *, served: bool = False) -> AudioUses:
    """All uses of all clips.

    Args:
        served: in the form that servers send rather than in the samples' own.
    """
    found, done = [], 0
    for tokens, ends, spans in _batches(samples, served=served):
        found.append(_find(tokens, ends, spans, parts, first_row=done))
        done += len(ends)
    names = [field.name for field in fields(AudioUses)]
    nothing = _find(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros((0, 2), np.int64), parts, first_row=0)
    return AudioUses(**{name: np.concatenate([getattr(one, name) for one in (nothing, *found)]) for name in names})


def _batches(samples: SampleTable, *, served: bool) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All tokens of some thousand samples, where each sample ends, and the spans [start, stop] that are learned."""
    names = ("served_tokens", "served_learned") if served else ("tokens", "learned")
    for batch in samples.table.select(names).to_batches():
        if not batch.num_rows:
            continue
        tokens, ends = _flat(batch.column(names[0]))
        edges, edge_ends = _flat(batch.column(names[1]))
        starts = np.concatenate([[0], ends[:-1]])
        yield tokens, ends, (edges + np.repeat(starts, np.diff(edge_ends, prepend=0))).reshape(-1, 2)


def _flat(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all lists, and where each list ends."""
    offsets = np.asarray(lists.offsets)
    return np.asarray(lists.values)[offsets[0] : offsets[-1]], (offsets[1:] - offsets[0]).astype(np.int64)


@dataclass(frozen=True)
class _Turns:
    """Messages, of samples one after another: [turns] each; see `conditions.PromptParts`.

    said: from `content` to the end token.
    """

    row: np.ndarray
    role: np.ndarray
    content: np.ndarray
    end: np.ndarray


def _find_turns(tokens: np.ndarray, ends: np.ndarray, parts: PromptParts) -> _Turns:
    starts = np.flatnonzero(tokens == parts.prefixes["user"][0])
    row = np.searchsorted(ends, starts, side="right")
    stops = np.minimum(np.append(starts[1:], len(tokens)), ends[row])
    role = np.full(len(starts), -1)
    content = starts.copy()
    for number, name in enumerate(ROLES):
        found = _begins_with(tokens, starts, stops, parts.prefixes[name])
        role[found] = number
        content[found] += len(parts.prefixes[name])
    known = role >= 0
    return _Turns(row[known], role[known], content[known], stops[known] - 1)


def _begins_with(tokens: np.ndarray, starts: np.ndarray, stops: np.ndarray, prefix: tuple[int, ...]) -> np.ndarray:
    """Of spans of tokens whether each begins with the tokens `prefix`."""
    found = starts + len(prefix) <= stops
    for offset, token in enumerate(prefix):
        found[found] = tokens[starts[found] + offset] == token
    return found


def _find(tokens: np.ndarray, ends: np.ndarray, spans: np.ndarray, parts: PromptParts, *, first_row: int) -> AudioUses:
    layout = parts.layout
    is_input = tokens == layout.audio_in_token
    audio = np.flatnonzero(is_input | (tokens == layout.audio_out_token))
    turns = _find_turns(tokens, ends, parts)
    turn = np.searchsorted(turns.content, audio, side="right") - 1
    in_turn = np.bincount(turn, minlength=len(turns.row))
    is_user, is_answer = turns.role[turn] == _USER, turns.role[turn] == _ASSISTANT
    learned = np.searchsorted(spans[:, 0], audio, side="right") > np.searchsorted(spans[:, 1], audio, side="right")

    row = turns.row[turn]
    start, stop = turns.content[turn], audio - 1  # before the token that opens the audio
    beside = stop > start
    asked, asked_bare = _asked_before(tokens, turns, in_turn, parts)
    from_asked = is_answer & ~beside & asked_bare[turn]
    start = np.where(from_asked, turns.content[turn - 1], start)
    stop = np.where(from_asked, turns.end[turn - 1], stop)
    first_token = np.concatenate([[0], ends])[row]
    first_use = np.searchsorted(row, row)  # of the same sample
    return AudioUses(
        row=(first_row + row).astype(np.int32),
        place=(np.arange(len(row)) - first_use).astype(np.int32),
        is_input=is_input[audio],
        is_target=is_answer & learned,
        is_reference=(is_user & (audio + 2 < turns.end[turn])) | (is_answer & ~learned),
        is_single=in_turn[turn] == 1,
        can_change=is_user | (asked[turn] == (asked_bare[turn] & ~beside)),
        text_start=(start - first_token).astype(np.int32),
        text_stop=(stop - first_token).astype(np.int32),
    )


def _asked_before(
    tokens: np.ndarray, turns: _Turns, in_turn: np.ndarray, parts: PromptParts
) -> tuple[np.ndarray, np.ndarray]:
    """Of each message whether a user message of text alone is right before it, and whether that is without a phrase."""
    is_text = (turns.role == _USER) & (in_turn == 0) & (turns.end > turns.content)
    is_bare = is_text & ~_begins_with(tokens, turns.content, turns.end, parts.phrase)
    follows = np.append(False, turns.row[1:] == turns.row[:-1]) if len(turns.row) else np.zeros(0, np.bool_)
    return np.append(False, is_text)[: len(is_text)] & follows, np.append(False, is_bare)[: len(is_bare)] & follows

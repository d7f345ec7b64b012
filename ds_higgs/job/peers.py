"""Which ranks of a job are known to be gone: by /proc on this machine, by the silence of a whole machine elsewhere."""

import time
from collections.abc import Sequence

from ds_higgs.job.failure_record import Failure
from ds_higgs.job.job_store import JobStore, Peer
from ds_higgs.job.processes import OtherProcess, process_space

SILENCE_SECONDS = 20.0  # without a beat of any of its ranks a machine does not answer
GAP_SECONDS = 3.0  # between two looks: this process was suspended itself


class Peers:
    """What one rank sees of the others.

    A rank of this machine may be silent for as long as it likes, suspended or held in a page fault: only its process's
    end counts. Of other machines the next one is listened to, and one beating rank speaks for all of its machine,
    whose deaths it would tell.
    """

    def __init__(self, peers: Sequence[Peer], *, rank: int):
        space = peers[rank].space
        assert space == process_space()
        here = [peer for peer in peers if peer.space == space]
        self.is_one_machine = len(here) == len(peers)
        self._processes = {peer.rank: OtherProcess(peer.process) for peer in here if peer.rank != rank}
        self._listened_to = _next_machine(peers, space)
        self._clock = SilenceClock()

    def find_dead(self) -> int | None:
        """The first rank of this machine whose process is gone."""
        return next((rank for rank, process in self._processes.items() if process.is_dead()), None)

    def find_lost(self, store: JobStore) -> Failure | None:
        """A rank that is gone, or does not answer, before it has finished."""
        dead = self.find_dead()
        if dead is not None and not store.has_finished(dead):
            return self.death_of(dead)
        return self._find_silent(store)

    def death_of(self, rank: int) -> Failure:
        return Failure(rank, f"rank {rank} died without a message (its process {self._processes[rank].number} is gone)")

    def _find_silent(self, store: JobStore) -> Failure | None:
        ranks = [peer.rank for peer in self._listened_to]
        seconds = self._clock.observe(store.beats_of(ranks), time.monotonic())
        if not ranks or seconds <= SILENCE_SECONDS:
            return None
        silent = next((peer for peer in self._listened_to if not store.has_finished(peer.rank)), None)
        if silent is None:
            return None
        return Failure(silent.rank, f"rank {silent.rank} on {silent.host} has not answered for {SILENCE_SECONDS:.0f} s")


class SilenceClock:
    """For how long a value has not changed; time in which nobody looked does not count."""

    def __init__(self) -> None:
        self._value: object = None
        self._changed = self._looked = float("-inf")

    def observe(self, value: object, now: float) -> float:
        """Seconds since the last change, or since a gap between two looks."""
        if value != self._value or now - self._looked > GAP_SECONDS:
            self._value, self._changed = value, now
        self._looked = now
        return now - self._changed


def _next_machine(peers: Sequence[Peer], space: str) -> list[Peer]:
    """The ranks of the machine after this one, in a ring; none where there is one machine."""
    spaces = list(dict.fromkeys(peer.space for peer in peers))
    following = spaces[(spaces.index(space) + 1) % len(spaces)]
    return [peer for peer in peers if peer.space == following and following != space]

"""What the ranks of a job tell each other outside collectives: the keys in the launch's key-value store.

The store asks nobody who he is: whoever reaches its port can read and write it, so that it wants a trusted network.
"""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from ds_higgs.job.failure_record import Failure
from ds_higgs.job.processes import process_space

START_SECONDS = 300.0  # for the other ranks to start, imports and all


@dataclass(frozen=True)
class Peer:
    """A rank, its process, and where that number means this process."""

    rank: int
    process: int
    space: str
    host: str


class JobStore:
    """Of one rank. Its methods raise RuntimeError where the store is gone, and wait while its host is suspended."""

    def __init__(self, rank: int, world_size: int):
        self.rank = rank
        self.world_size = world_size
        self._store = _connect(rank)

    def check_in(self) -> None:
        own = {"process": os.getpid(), "space": process_space(), "host": socket.gethostname()}
        self._store.set(f"process/{self.rank}", json.dumps(own))

    def missing(self) -> list[int]:
        """Ranks that have not checked in."""
        return [rank for rank in range(self.world_size) if not self._store.check([f"process/{rank}"])]

    def peers(self) -> list[Peer]:
        """All ranks, once none is missing."""
        return [Peer(rank, **json.loads(self._store.get(f"process/{rank}"))) for rank in range(self.world_size)]

    def beat(self, count: int) -> None:
        self._store.set(f"beat/{self.rank}", str(count))

    def beats_of(self, ranks: Sequence[int]) -> list[bytes]:
        return [self._store.get(key) if self._store.check([key := f"beat/{rank}"]) else b"" for rank in ranks]

    def finish(self) -> None:
        self._store.set(f"finished/{self.rank}", "")

    def has_finished(self, rank: int) -> bool:
        return self._store.check([f"finished/{rank}"])

    def announce(self, failure: Failure) -> Failure:
        """Make a failure known unless another one was first; the first one."""
        return Failure.decode(self._store.compare_set("failure", "", failure.encode()))

    def announced(self) -> Failure | None:
        return Failure.decode(self._store.get("failure")) if self._store.check(["failure"]) else None

    def ask_to_stop(self, reason: str) -> None:
        self._store.set("stop", reason)

    def stop_reason(self) -> str | None:
        """Why a rank was asked to stop, if one was."""
        return self._store.get("stop").decode(errors="replace") if self._store.check(["stop"]) else None

    def leave(self) -> None:
        self._store.add("gone", 1)

    def num_left(self) -> int:
        """Ranks that have ended after a failure."""
        return self._store.add("gone", 0)


def _connect(rank: int) -> Store:
    """A connection of our own: the process group's waits while a collective does.

    It is made before the process group, so that rank 0 may have to open the store: torch then takes the same one.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    launcher_holds_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        address,
        port,
        is_master=rank == 0 and not launcher_holds_it,
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(seconds=START_SECONDS),
    )
    store.set_timeout(timedelta(days=1))  # a host that is suspended is not gone
    return PrefixStore(f"ds_higgs/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

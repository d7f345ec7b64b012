"""Ranks that are threads of one process, for what ranks tell each other through a `RankChannel`."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tests.support.patience import HANG_S

Result = TypeVar("Result")


class RankThreads:
    """`count` ranks; every one of them must call what they call together."""

    def __init__(self, count: int):
        self.count = count
        self._barrier = threading.Barrier(count, timeout=HANG_S)
        self._told = [b""] * count

    def wait(self) -> None:
        self._barrier.wait()

    def gather_of(self, rank: int) -> Callable[[bytes], list[bytes]]:
        """`RankChannel.gather` of one rank."""

        def gather(content: bytes) -> list[bytes]:
            self._told[rank] = content
            self.wait()
            found = list(self._told)
            self.wait()
            return found

        return gather

    def run(self, work: Callable[[int], Result]) -> list[Result]:
        """What `work(rank)` returns on each rank, by rank; it raises what the first of them raised."""
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(work, range(self.count)))

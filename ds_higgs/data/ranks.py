"""The channel between processes that prepare a data set together."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ds_higgs.errors import UserError


@dataclass(frozen=True)
class RankChannel:
    """This process among those that build a data set together; alone by default.

    gather: gives every rank all ranks' bytes, by rank. It is their own channel: what ranks tell each other lies in no
        folder where another job could find it.
    stop_requested: whether this rank was asked to stop; it then leaves its share where it is.
    stop_here: raises on all ranks where any was asked to stop; they call it together.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[bytes], list[bytes]] = lambda content: [content]
    stop_requested: Callable[[], bool] = lambda: False
    stop_here: Callable[[], None] = lambda: None

    def tell(self, content: Any) -> list[Any]:
        """Every rank's content, by rank, as JSON keeps it."""
        return [json.loads(found) for found in self.gather(json.dumps(content).encode())]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on rank 0, on every rank; what it raises there is raised on all.

        Raises:
            UserError: it was raised on rank 0.
            RuntimeError: on the others, for anything else.
        """
        error: Exception | None = None
        told: dict[str, Any] = {}
        if self.rank == 0:
            try:
                told = {"result": action()}
            except Exception as raised:
                error, told = raised, {"error": str(raised), "of_user": isinstance(raised, UserError)}
        found = self.tell(told)[0]
        if error is not None:
            raise error
        if "error" in found:
            raise (UserError if found["of_user"] else RuntimeError)(found["error"])
        return found["result"]


ALONE = RankChannel()

"""What is known of a job's failure: said on the screen, told to the other ranks, kept in the run's folder."""

import json
import signal
import sys
import traceback
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from ds_higgs.errors import UserError
from ds_higgs.files import write_atomically
from ds_higgs.run_folder import FAILURE_FILE

STATUS_USER_ERROR = 2
STATUS_INTERRUPTED = 128 + signal.SIGINT
_STATUSES = (1, STATUS_USER_ERROR, STATUS_INTERRUPTED)


@dataclass(frozen=True)
class Failure:
    """The first failure of a job. status: the exit status for all ranks, never 0."""

    rank: int
    message: str
    status: int = 1

    @classmethod
    def of(cls, rank: int, error: BaseException) -> "Failure":
        """What an exception says: the user's mistake in its own words, anything else with the way that led to it."""
        if isinstance(error, UserError):
            return cls(rank, str(error), STATUS_USER_ERROR)
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, "interrupted", STATUS_INTERRUPTED)
        return cls(rank, "".join(traceback.format_exception(error)).rstrip())

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, content: bytes) -> "Failure":
        """A peer's record. Whatever it holds, the job has failed: its word never makes a status of 0."""
        try:
            found = json.loads(content)
            rank, message, status = int(found["rank"]), str(found["message"]), found["status"]
        except (ValueError, TypeError, KeyError):
            return cls(-1, f"a record of a failure that cannot be read: {content[:200]!r}")
        return cls(rank, message, status if status in _STATUSES else 1)

    @property
    def summary(self) -> str:
        """The last line."""
        return (self.message.splitlines() or [""])[-1]

    def shown(self) -> str:
        """What the rank that failed says on the screen."""
        return f"rank {self.rank} failed:\n{self.message}" if self.status == 1 else f"ds-higgs: {self.message}"

    def keep(self, run_dir: Path | None) -> None:
        """Write it into the run's folder, where a run has been set up in it and it can be written."""
        if run_dir is None or not (run_dir / "config.yaml").is_file():
            return
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        try:
            write_atomically(run_dir / FAILURE_FILE, f"{when} rank {self.rank}: {self.message}\n".encode())
        except OSError as error:
            print(f"could not write {run_dir / FAILURE_FILE}: {error}", file=sys.stderr, flush=True)

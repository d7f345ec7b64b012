"""How long tests wait: without end for what is not about time, longer on a busy machine for what is."""

import os

# Only ends what hangs. Nothing may depend on it: a busy machine makes a minute's work last ten.
HANG_S = 600.0


def patience(seconds: float) -> float:
    """A promise's `seconds`, which hold where every runnable process has a core, stretched by today's load per core."""
    cores = len(os.sched_getaffinity(0))
    return seconds * max(1.0, os.getloadavg()[0] / cores)

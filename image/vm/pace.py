"""How slow this machine is at the moment: the one place that time-outs are scaled by.

Time-outs bound what goes wrong; where all goes well but slowly (a machine that is emulated itself, ten other jobs on
it) they have to allow for it.  So the machine is measured, once in a process, and not assumed.
"""

from __future__ import annotations

import functools
import os
import time

#: Seconds of processor time that the measured loop takes on a machine of 2020.
NOMINAL = 0.0015
ROUNDS = 30_000

#: What a time-out may grow to: beyond this, a person would rather know.
MAX_SLOWNESS = 20.0


@functools.cache
def slowness() -> float:
    """Return how many times as long as on a quiet machine of 2020 things may take here: 1 to 20."""
    return min(MAX_SLOWNESS, max(1.0, _processor()) * max(1.0, _load()))


def scaled(seconds: float) -> float:
    """Return a time-out for this machine."""
    return seconds * slowness()


def _processor() -> float:
    """Measure the processor: the best of three loops, in processor time, so that other jobs do not count twice."""
    best = min(_loop() for _ in range(3))
    return best / NOMINAL


def _loop() -> float:
    began = time.process_time()
    number = 0
    for each in range(ROUNDS):
        number ^= each
    return time.process_time() - began


def _load() -> float:
    """Return the jobs for each processor, as of the last minute."""
    try:
        return os.getloadavg()[0] / len(os.sched_getaffinity(0))
    except OSError:
        return 1.0

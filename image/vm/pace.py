"""How slow this machine currently is: the one place that scales timeouts.

Timeouts must bound failures, but allow for slow machines (emulated ones, or with ten other jobs).  So the machine is
measured, once per process.
"""

from __future__ import annotations

import functools
import os
import time

#: Seconds of CPU time of the measured loop on a machine of 2020.
NOMINAL = 0.0015
ROUNDS = 30_000

#: Maximum factor: beyond this, users prefer an error.
MAX_SLOWNESS = 20.0


@functools.cache
def slowness() -> float:
    """Return the slowdown relative to an idle machine of 2020: 1 to 20."""
    return min(MAX_SLOWNESS, max(1.0, _processor()) * max(1.0, _load()))


def scaled(seconds: float) -> float:
    """Scale a timeout for this machine."""
    return seconds * slowness()


def _processor() -> float:
    """Measure the CPU: the best of three loops, in CPU time, so that other jobs do not count twice."""
    best = min(_loop() for _ in range(3))
    return best / NOMINAL


def _loop() -> float:
    began = time.process_time()
    number = 0
    for each in range(ROUNDS):
        number ^= each
    return time.process_time() - began


def _load() -> float:
    """Return the load per CPU over the last minute."""
    try:
        return os.getloadavg()[0] / len(os.sched_getaffinity(0))
    except OSError:
        return 1.0

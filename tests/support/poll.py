"""Poll for conditions in other processes that no event announces.  Prefer events where there are any."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from caisson.image.vm.pace import scaled

Condition = Callable[[], object]
Found = Callable[[], object] | None

WHAT = "what a test waits for"

#: Seconds within which anything is done on a machine of 2020 (at most what pytest leaves to a test), and between two
#: polls.
TIMEOUT, MAX_TIMEOUT = 60.0, 240.0
INTERVAL = 0.01


def wait_until(condition: Condition, what: str = WHAT, timeout: float | None = None, found: Found = None) -> None:
    """Poll until a condition holds; at a timeout fail with its description, and what ``found`` returns then."""
    timeout = timeout or min(scaled(TIMEOUT), MAX_TIMEOUT)
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(_complaint(what, timeout, found))
        time.sleep(INTERVAL)


async def until(condition: Condition, what: str = WHAT, timeout: float | None = None, found: Found = None) -> None:
    """Do the same as ``wait_until``, and let other tasks run meanwhile."""
    timeout = timeout or min(scaled(TIMEOUT), MAX_TIMEOUT)
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(_complaint(what, timeout, found))
        await asyncio.sleep(INTERVAL)


def _complaint(what: str, timeout: float, found: Found) -> str:
    return f"{what}: not within {timeout:.0f} s" + (f": {found()}" if found else "")

"""Waiting: the one thing that differs between a command and a program with an event loop.

Operations that take time are coroutines over `Waits`.  An event loop awaits them; a command runs them with `complete`,
using blocking waits.
"""

from __future__ import annotations

import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, Protocol, TypeVar

    T = TypeVar("T")

    class Waits(Protocol):
        """Wait for descriptors and for time."""

        async def readable(self, *fds: int, seconds: float | None = None) -> bool:
            """Wait until one of the descriptors is readable; False on timeout (`seconds`)."""
            ...

        async def drive(self, fd: int, step: Callable[[], bool], seconds: float | None = None) -> bool:
            """Call ``step`` whenever the descriptor is readable, until it returns true; False after `seconds`."""
            ...

        async def sleep(self, seconds: float) -> None:
            """Sleep."""
            ...

        async def work(self, function: Callable[[], T], *, seconds: float | None = None) -> T:
            """Call a function that computes or blocks for long, without blocking others.

            Raises TimeoutError after `seconds`, if the caller can continue without it.
            """
            ...


class BlockingWaits:
    """Blocking waits, for a program without other work."""

    async def readable(self, *fds: int, seconds: float | None = None) -> bool:
        """Wait by poll(2)."""
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        return bool(poll.poll(None if seconds is None else max(0, int(seconds * 1000 + 0.999))))

    async def drive(self, fd: int, step: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait by poll(2), again and again."""
        deadline = Deadline(seconds)
        while await self.readable(fd, seconds=deadline.left):
            if step():
                return True
        return False

    async def sleep(self, seconds: float) -> None:
        """Wait by nanosleep(2)."""
        time.sleep(seconds)  # noqa: ASYNC251 - a program without an event loop

    async def work(self, function: Callable[[], T], *, seconds: float | None = None) -> T:
        """Call it directly, without a timeout."""
        return function()


def complete(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine over BlockingWaits to completion: it never suspends."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    work.close()
    raise RuntimeError("the coroutine waits for an event loop; complete() is for BlockingWaits")


class Deadline:
    """A point in time, or none."""

    def __init__(self, seconds: float | None) -> None:
        self._at = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float | None:
        """Seconds until then, not below 0; None if there is no limit."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())


async def wait_until(condition: Callable[[], bool], seconds: float, waits: Waits) -> bool:
    """Poll for a condition that the kernel does not announce; returns whether it came true in time."""
    pause = 0.0005
    deadline = Deadline(seconds)
    while not condition():
        if not deadline.left:
            return False
        await waits.sleep(pause)
        pause = min(pause * 2, 0.05)
    return True

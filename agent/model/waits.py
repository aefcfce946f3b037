"""The library's waits (libcontainer/waits.py) on the event loop."""

from __future__ import annotations

import asyncio
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    T = TypeVar("T")


class AsyncioWaits:
    """Wait without holding up others.  A descriptor is waited for by one caller at a time."""

    async def readable(self, *fds: int, seconds: float | None = None) -> bool:
        """Wait until one of the descriptors can be read; False when that takes longer than `seconds`."""
        if seconds == 0:
            poll = select.poll()
            for fd in fds:
                poll.register(fd, select.POLLIN)
            return bool(poll.poll(0))
        return await _drive(fds, lambda: True, seconds)

    async def drive(self, fd: int, step: Callable[[], bool], seconds: float | None = None) -> bool:
        """Call ``step`` whenever the descriptor can be read until it returns true; False after `seconds`."""
        return await _drive((fd,), step, seconds)

    async def sleep(self, seconds: float) -> None:
        """Let time pass."""
        await asyncio.sleep(seconds)

    async def work(self, function: Callable[[], T]) -> T:
        """Call a function that computes for long in a thread."""
        return await asyncio.to_thread(function)


async def _drive(fds: Sequence[int], step: Callable[[], bool], seconds: float | None) -> bool:
    """Call ``step`` in the event loop, which has the descriptors registered once, until it returns true or raises."""
    loop = asyncio.get_running_loop()
    happened: asyncio.Future[bool] = loop.create_future()

    def ready() -> None:
        if happened.done():
            return
        try:
            if step():
                happened.set_result(True)
        except Exception as error:
            happened.set_exception(error)

    def late() -> None:
        if not happened.done():
            happened.set_result(False)

    timer = None if seconds is None else loop.call_later(seconds, late)
    for fd in fds:
        loop.add_reader(fd, ready)
    try:
        return await happened
    finally:
        for fd in fds:
            loop.remove_reader(fd)
        if timer is not None:
            timer.cancel()

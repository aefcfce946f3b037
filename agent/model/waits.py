"""The library's waits (libcontainer/waits.py) on the event loop."""

from __future__ import annotations

import asyncio
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
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
        loop = asyncio.get_running_loop()
        happened: asyncio.Future[bool] = loop.create_future()

        def settle(result: bool) -> None:
            if not happened.done():
                happened.set_result(result)

        timer = None if seconds is None else loop.call_later(seconds, settle, False)
        for fd in fds:
            loop.add_reader(fd, settle, True)
        try:
            return await happened
        finally:
            for fd in fds:
                loop.remove_reader(fd)
            if timer is not None:
                timer.cancel()

    async def sleep(self, seconds: float) -> None:
        """Let time pass."""
        await asyncio.sleep(seconds)

    async def work(self, function: Callable[[], T]) -> T:
        """Call a function that computes for long in a thread."""
        return await asyncio.to_thread(function)

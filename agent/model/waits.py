"""The library's waits (libcontainer/waits.py) on the event loop."""

from __future__ import annotations

import asyncio
import select

from caisson.agent.base.errors import ReadTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import ThreadPoolExecutor
    from typing import TypeVar

    T = TypeVar("T")

#: Maximum threads that inspect one container, and timeout of each in seconds.
MAX_READERS = 2
READ_TIMEOUT = 10.0


class AsyncioWaits:
    """Wait without blocking the event loop.  Only one caller at a time may wait for a descriptor."""

    async def readable(self, *fds: int, seconds: float | None = None) -> bool:
        """Wait until one of the descriptors is readable; False on timeout (`seconds`)."""
        if seconds == 0:
            poll = select.poll()
            for fd in fds:
                poll.register(fd, select.POLLIN)
            return bool(poll.poll(0))
        return await _drive(fds, lambda: True, seconds)

    async def drive(self, fd: int, step: Callable[[], bool], seconds: float | None = None) -> bool:
        """Call ``step`` whenever the descriptor is readable, until it returns true; False after `seconds`."""
        return await _drive((fd,), step, seconds)

    async def sleep(self, seconds: float) -> None:
        """Sleep."""
        await asyncio.sleep(seconds)

    async def work(self, function: Callable[[], T], *, seconds: float | None = None) -> T:
        """Call a function that computes for long in a thread.  Raises TimeoutError, after which the thread
        continues.
        """
        async with asyncio.timeout(seconds):  # not wait_for, which before 3.12 can lose the cancellation of its caller
            return await asyncio.to_thread(function)


async def _drive(fds: Sequence[int], step: Callable[[], bool], seconds: float | None) -> bool:
    """Call ``step`` from the event loop, with the descriptors registered once, until it returns true or raises."""
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


class Readers:
    """Read a container's data in threads of its own.

    The container determines how long that takes: by the number of its processes and cgroups, or forever, if its memory
    or files are served by one of its own processes (fuse(4)).  So it must block neither the event loop nor other
    containers' threads.
    """

    def __init__(self, container_id: str) -> None:
        self._name = container_id
        self._threads: ThreadPoolExecutor | None = None

    async def __call__(self, function: Callable[[], T]) -> T:
        """Call a function in one of them.  Raises ReadTimeout, after which the thread continues."""
        if self._threads is None:
            from concurrent.futures import ThreadPoolExecutor

            self._threads = ThreadPoolExecutor(MAX_READERS, "container")
        work = asyncio.get_running_loop().run_in_executor(self._threads, function)
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                return await work
        except TimeoutError:
            raise ReadTimeout(container_id=self._name, seconds=READ_TIMEOUT) from None

    def close(self) -> None:
        """End the threads once they are idle."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

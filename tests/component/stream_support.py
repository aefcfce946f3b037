"""Children and pipes for tests of streams."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import termios
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

from caisson.agent.base.errors import EndOfStream
from caisson.agent.model.reaper import Child
from caisson.agent.model.stdio import LARGEST_READ, Output


@contextlib.contextmanager
def no_descriptor_is_left() -> Iterator[None]:
    """Check that a test leaves no descriptor open."""
    before = sorted(Path("/proc/self/fd").iterdir())
    yield
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def running_child() -> Child:
    """Provide a child that exits when the test says so."""
    return Child(0)


async def read_all(output: Output, child: Child) -> bytes:
    data = b""
    try:
        while True:
            data += await output.read(LARGEST_READ, child)
    except EndOfStream:
        return data


async def pending(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Return a task that has run as far as it can, and waits."""
    task = asyncio.ensure_future(work)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()
    return task


def bytes_in(fd: int) -> int:
    """Return the number of bytes in a pipe."""
    value = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, value)
    return value[0]

"""Additions to asyncio: run a coroutine to completion despite cancellation, connect, relay between two connections."""

from __future__ import annotations

import asyncio
import os
import socket
from functools import wraps

#: Bytes copied at once.
BLOCK = 1 << 16

#: Seconds between two attempts to connect to a socket whose queue is full.
RETRY_INTERVAL = 0.01

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, ParamSpec, TypeVar

    T = TypeVar("T")
    P = ParamSpec("P")
    Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def run_to_completion(work: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine that runs to completion even when the awaiting task is cancelled.

    A host that disconnects in the middle of a request must not leave it half done.
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(_retrieve_exception)
    return await asyncio.shield(task)


def runs_to_completion(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Decorate a coroutine function so that its calls run to completion, as by `run_to_completion`."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        return run_to_completion(function(*args, **kwargs))

    return call


def _retrieve_exception(task: asyncio.Future[Any]) -> None:
    """Mark an exception as retrieved: the awaiting task may be gone, and asyncio would warn."""
    if not task.cancelled():
        task.exception()


async def connect_unix(path: str | os.PathLike[str]) -> socket.socket:
    """Connect to a Unix socket, waiting while its listener's queue is full; returns a socket that does not block.

    No event reports that there is room again (EAGAIN, connect(2)): asyncio would take the socket for connected.  Raises
    OSError.
    """
    connected = socket.socket(socket.AF_UNIX)
    try:
        connected.setblocking(False)
        while True:
            try:
                connected.connect(os.fspath(path))
                return connected
            except BlockingIOError:
                await asyncio.sleep(RETRY_INTERVAL)
    except BaseException:
        connected.close()
        raise


async def join(one: Streams, other: Streams) -> None:
    """Relay bytes both ways until both have ended, and close ``other``.  Raises OSError."""
    try:
        await asyncio.gather(_relay(one[0], other[1]), _relay(other[0], one[1]))
    finally:
        other[1].close()


async def _relay(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(BLOCK):
        target.write(data)
        await target.drain()
    target.write_eof()

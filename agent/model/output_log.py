"""Drain and keep the output of a process that nobody is attached to, so that it does not block on a full pipe."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from caisson.agent.base.errors import EndOfStream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from caisson.agent.model.process import Process

#: Maximum bytes of one read, and of one response.
READ = 1 << 16
MAX_ANSWER = 1 << 20

#: Bytes that a piece counts as at least: it takes more than that in memory, and a process may write single bytes.
MIN_PIECE = 128

STDOUT, STDERR = 1, 2


class OutputPiece:
    """The result of one read.

    ``number`` is the offset of its first byte in all of the process's output, ``time`` in nanoseconds since 1970.
    """

    __slots__ = ("data", "number", "stream", "time")

    def __init__(self, number: int, time: int, stream: int, data: bytes) -> None:
        self.number = number
        self.time = time
        self.stream = stream
        self.data = data


class OutputLog:
    """The last ``max_bytes`` of a process's output, less if it was written in small pieces; older ones are dropped."""

    def __init__(self, process: Process, max_bytes: int) -> None:
        self.process = process
        self._max_bytes = max_bytes
        self._entries: deque[OutputPiece] = deque()
        self._bytes = 0
        self._next = 0
        self._changed = asyncio.Event()
        streams = [(STDOUT, process.read_stdout)]
        if not process.has_terminal:
            streams.append((STDERR, process.read_stderr))
        self._open = len(streams)
        self._tasks = [asyncio.create_task(self._drain(stream, read)) for stream, read in streams]

    async def _drain(self, stream: int, read: Callable[[int], Awaitable[bytes]]) -> None:
        try:
            while True:
                self._add(stream, await read(READ))
        except EndOfStream:
            pass
        finally:
            self._open -= 1
            self._notify()

    def _add(self, stream: int, data: bytes) -> None:
        self._entries.append(OutputPiece(self._next, time.time_ns(), stream, data))
        self._next += len(data)
        self._bytes += max(len(data), MIN_PIECE)
        while self._bytes > self._max_bytes and len(self._entries) > 1:
            self._bytes -= max(len(self._entries.popleft().data), MIN_PIECE)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, begin: int, *, follow: bool) -> tuple[list[OutputPiece], bool]:
        """Return the entries from byte ``begin`` on that fit into one response, and whether these were the last.

        With ``follow``, wait if there is nothing.
        """
        while True:
            found: list[OutputPiece] = []
            size = 0
            for entry in self._entries:
                if entry.number >= begin and size < MAX_ANSWER:
                    found.append(entry)
                    size += len(entry.data)
            ended = not self._open and (not found or found[-1] is self._entries[-1])
            if found or ended or not follow:
                return found, ended
            await self._changed.wait()

    def close(self) -> None:
        """Stop draining, and discard what was kept."""
        for task in self._tasks:
            task.cancel()
        self._entries.clear()

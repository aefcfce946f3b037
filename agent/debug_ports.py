"""Debugging services beside the API: the agent's log and a debug console.

Each has its own vsock port, only for the host, and is off unless an option enables it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections import deque

from caisson.agent.base.errors import BrokenStream, EndOfStream
from caisson.agent.model.stdio import Streams
from caisson.agent.rpc.listener import connections
from caisson.proto.contract import BUSYBOX_ROOTFS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from caisson.agent.base.log import Log
    from caisson.agent.model.reaper import Child, Reaper

#: Bytes of the log that are buffered for late or slow readers.
MAX_BUFFERED = 1 << 18
BLOCK = 1 << 16

#: The first of these that exists is used; the last is from the guest's container image, and has no dependencies.
SHELLS = (("/bin/bash",), ("/bin/sh",), (f"{BUSYBOX_ROOTFS}/bin/busybox", "sh"))
ENVIRONMENT = {"PATH": "/bin:/sbin:/usr/bin:/usr/sbin", "HOME": "/", "TERM": "linux"}
RESTART_SECONDS = 1.0


class VsockListener:
    """Accept connections from the host and serve each until it ends."""

    def __init__(self, listener: socket.socket, serve: Callable[[socket.socket], Awaitable[None]], log: Log) -> None:
        self._listener = listener
        self._serve = serve
        self._log = log
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Accept until cancelled."""
        try:
            async for connection in connections(self._listener, self._log):
                task = asyncio.get_running_loop().create_task(self._serving(connection))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            self._listener.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serving(self, connection: socket.socket) -> None:
        with connection:
            try:
                await self._serve(connection)
            except OSError as error:
                self._log("debug", "a connection ended", error=str(error))


class LogStream:
    """Stream the log, starting with buffered lines; a reader that is too slow loses the oldest."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._end = 0  # total number of lines
        self._news = asyncio.Event()

    def add(self, line: bytes) -> None:
        """Append a line."""
        self._lines.append(line)
        self._end += 1
        self._size += len(line)
        while self._size > MAX_BUFFERED:
            self._size -= len(self._lines.popleft())
        self._news.set()

    async def serve(self, connection: socket.socket) -> None:
        """Send lines until the peer disconnects."""
        loop = asyncio.get_running_loop()
        closed = asyncio.ensure_future(loop.sock_recv(connection, 1))
        at = self._end - len(self._lines)
        try:
            while not closed.done():
                oldest = self._end - len(self._lines)
                data = b""
                if at < oldest:
                    data = b'{"level": "warning", "msg": "lines were lost: read too slowly", "count": %d}\n' % (
                        oldest - at
                    )
                    at = oldest
                data += b"".join(list(self._lines)[at - oldest :])
                at = self._end
                if data:
                    await loop.sock_sendall(connection, data)
                    continue
                self._news.clear()
                news = asyncio.ensure_future(self._news.wait())
                try:
                    await asyncio.wait([news, closed], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    news.cancel()
        finally:
            closed.cancel()


class DebugConsole:
    """Serve shells in the guest itself, each on a terminal of its own."""

    def __init__(self, reaper: Reaper, log: Log) -> None:
        self._reaper = reaper
        self._log = log

    async def serve(self, connection: socket.socket) -> None:
        """Connect a shell to a connection until either ends; then kill the shell's whole session."""
        master, terminal = os.openpty()
        try:
            child = self._spawn(os.ttyname(terminal))
        except OSError as error:
            os.close(master)
            await asyncio.get_running_loop().sock_sendall(connection, f"no shell: {error}\r\n".encode())
            return
        finally:
            os.close(terminal)
        streams = Streams.of_terminal(master)
        streams.resize(24, 80)
        ways = [asyncio.ensure_future(way(connection, streams, child)) for way in (_output, _input)]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            streams.close()  # SIGHUP to the session
            if child.status is None:
                child.signal(signal.SIGKILL)
            await child.wait()

    async def on_console(self) -> None:
        """Run a shell on the machine's console, restarting it until cancelled."""
        while True:
            try:
                await self._spawn("/dev/console").wait()
            except OSError as error:
                self._log("error", "no shell on the console", error=str(error))
                return
            await asyncio.sleep(RESTART_SECONDS)

    def _spawn(self, terminal: str) -> Child:
        """Start a shell in a new session, whose controlling terminal is the first that it opens (setsid(2), tty(4))."""
        shell = next((words for words in SHELLS if os.access(words[0], os.X_OK)), None)
        if shell is None:
            raise FileNotFoundError(f"the image has none of {', '.join(words[0] for words in SHELLS)}")
        pid = os.posix_spawn(
            shell[0],
            [os.path.basename(shell[0]), *shell[1:]],  # noqa: PTH119 - no pathlib at start
            ENVIRONMENT,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, terminal, os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, 0, 1),
                (os.POSIX_SPAWN_DUP2, 0, 2),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )
        return self._reaper.claim(pid)


async def _output(connection: socket.socket, streams: Streams, child: Child) -> None:
    loop = asyncio.get_running_loop()
    try:
        while True:
            await loop.sock_sendall(connection, await streams.stdout.read(BLOCK, child))
    except EndOfStream:
        return


async def _input(connection: socket.socket, streams: Streams, child: Child) -> None:
    loop = asyncio.get_running_loop()
    try:
        while data := await loop.sock_recv(connection, BLOCK):
            await streams.stdin.write(data, child)
    except BrokenStream:
        return

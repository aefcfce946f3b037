"""The host's side: sockets that programs connect to, and sockets of programs that the guest connects to.

``vsock.sock`` speaks the hybrid handshake of Firecracker and Cloud Hypervisor (``CONNECT <port>``, answered by ``OK
<port>``, each with a newline); a raw socket stands for one port of the guest, with no handshake; the guest's
connections to port N go to ``vsock.sock_N``.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Callable

from .limits import DeviceLimits
from .log import RateLimitedLog, describe
from .loop import Loop

Accepted = Callable[[socket.socket], None]


class HostError(Exception):
    """A socket cannot be created; the text says which and why."""


class UnixListener:
    """A Unix socket, mode 0600, that accepts while ``has_room``; others wait in its backlog."""

    def __init__(
        self,
        path: str,
        loop: Loop,
        log: RateLimitedLog,
        limits: DeviceLimits,
        has_room: Callable[[], bool],
        accepted: Accepted,
    ) -> None:
        self.path = path
        self._loop = loop
        self._log = log
        self._limits = limits
        self._has_room = has_room
        self._accepted = accepted
        self._sock = bind(path)
        self._inode = os.lstat(path).st_ino
        self._watch()

    def close(self) -> None:
        """Stop listening, and remove the socket if it is still ours."""
        self._loop.remove(self._sock.fileno())
        self._sock.close()
        try:
            if os.lstat(self.path).st_ino == self._inode:
                os.unlink(self.path)  # noqa: PTH108
        except FileNotFoundError:
            pass

    def _watch(self) -> None:
        self._loop.add(self._sock.fileno(), select.EPOLLIN, self._ready, self._broken)

    def _ready(self, mask: int) -> None:
        for _ in range(16):
            if not self._has_room():
                self._pause()
                return
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptors left: the listener would stay ready
                self._log(f"{self.path}: {error.strerror}")
                self._pause()
                return
            self._accepted(sock)

    def _broken(self, error: Exception) -> None:
        self._log(f"{self.path}: {describe(error)}")
        self._pause()

    def _pause(self) -> None:
        self._loop.remove(self._sock.fileno())
        self._loop.after(self._limits.accept_pause, self._resume)

    def _resume(self) -> None:
        if self._sock.fileno() >= 0:
            self._watch()


class Handshakes:
    """Read CONNECT lines.  ``connect`` gets the socket, with the data after the line unread, and the port."""

    def __init__(
        self, loop: Loop, log: RateLimitedLog, limits: DeviceLimits, connect: Callable[[socket.socket, int], None]
    ) -> None:
        self._loop = loop
        self._log = log
        self._limits = limits
        self._connect = connect
        self.count = 0

    def begin(self, sock: socket.socket) -> None:
        """Read the CONNECT line of a socket that has just connected."""
        self.count += 1
        fd = sock.fileno()
        sock.setblocking(False)
        timer = self._loop.after(self._limits.connect_timeout, lambda: end())

        def leave() -> None:
            self.count -= 1
            timer.cancel()
            self._loop.remove(fd)

        def end() -> None:
            leave()
            sock.close()

        def ready(mask: int) -> None:
            try:
                line = sock.recv(self._limits.connect_line, socket.MSG_PEEK)
            except BlockingIOError:
                return
            except OSError:
                line = b""
            size = line.find(b"\n") + 1
            if (
                not size
                and 0 < len(line) < self._limits.connect_line
                and not mask & (select.EPOLLHUP | select.EPOLLERR)
            ):
                return  # incomplete
            port = parse(line[:size])
            if port is None:
                end()
                return
            sock.recv(size)
            leave()
            self._connect(sock, port)

        def broken(error: Exception) -> None:
            self._log(f"handshake: {describe(error)}")
            end()

        self._loop.add(fd, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET, ready, broken)


def parse(line: bytes) -> int | None:
    """Parse a CONNECT line; returns the port, None for any other line."""
    word, _, number = line.rstrip(b"\r\n").partition(b" ")
    if word.upper() != b"CONNECT" or not number.isdigit() or len(number) > 10:
        return None
    port = int(number)
    return port if port < 0xFFFFFFFF else None  # the last one is VMADDR_PORT_ANY


def bind(path: str) -> socket.socket:
    """Return a listening Unix socket, replacing one left by a killed process.  Raises HostError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    before = os.umask(0o177)
    try:
        remove_stale(path)
        sock.bind(path)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise HostError(f"cannot listen on {path}: {error.strerror or error}") from None
    finally:
        os.umask(before)
    return sock


def remove_stale(path: str) -> None:
    """Remove a socket without a listener."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)  # noqa: PTH108
        except BlockingIOError:
            pass  # there is a listener, with a full backlog


def dial(path: str) -> socket.socket:
    """Connect to a host program, without waiting: a full backlog is an error.  Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock

"""JSON objects, one per line, on a socket: the protocol of a supervisor and its starter, and of QEMU's monitor."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Maximum bytes of a line.
MAX_LINE = 4 << 20


class JSONSocket:
    """One end of such a socket; closing it closes the socket.

    ``fds`` are the descriptors received with objects, at most ``max_fds``; the caller closes them.
    """

    def __init__(self, connection: socket.socket, max_fds: int = 0) -> None:
        self._connection = connection
        self._received = b""
        self._max_fds = max_fds
        self.fds: list[int] = []

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send an object, with descriptors (unix(7), SCM_RIGHTS).  Raises OSError if the other end is closed."""
        self._connection.settimeout(None)
        data = json.dumps(message).encode() + b"\n"
        sent = socket.send_fds(self._connection, [data], fds) if fds else 0
        if sent < len(data):  # sending nothing also fails once the other end has closed, and it may have responded
            self._connection.sendall(data[sent:])

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """Return the next object; None at the end.  ``timeout`` in seconds; 0 takes only what has arrived.

        Raises TimeoutError, and ValueError for a line that is not a JSON object or too long.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._received:
            if len(self._received) > MAX_LINE:
                raise ValueError(f"a line of more than {MAX_LINE} bytes")
            self._connection.settimeout(None if deadline is None else max(0.0, deadline - time.monotonic()))
            try:
                data = self._recv()
            except BlockingIOError:
                raise TimeoutError from None
            except ConnectionError:
                data = b""
            if not data:
                return None
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError(f"not an object: {line[:80]!r}")
        return message

    def _recv(self) -> bytes:
        if len(self.fds) >= self._max_fds:
            return self._connection.recv(65536)  # the kernel closes descriptors that are not received
        data, fds, _, _ = socket.recv_fds(self._connection, 65536, self._max_fds - len(self.fds))
        for fd in fds:
            os.set_inheritable(fd, False)  # recv_fds of Python 3.11 ignores its flags
        self.fds += fds
        return data

    def finish(self) -> None:
        """Shut down sending; what the other end sends can still be received."""
        try:
            self._connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self._connection.close()

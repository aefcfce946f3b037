"""Probe whether a guest's agent serves: one call of Health.Check, without an event loop."""

from __future__ import annotations

import os
import socket
import time

from caisson.agent.rpc import wire
from caisson.agent.rpc.ttrpc import frames
from caisson.agent.rpc.ttrpc.responses import RpcError, payload_of

#: The field of a HealthCheckResponse, and its value.
STATUS, SERVING = 1, 1

#: Seconds between two attempts to reach an agent that does not listen yet; later a hundredth of the time taken so far,
#: as on a slow machine each attempt takes CPU time from the guest.
RETRY_INTERVAL = 0.02
RETRY_SHARE = 0.01


class ReadinessProbe:
    """Probe whether a guest's agent serves; the `ready` of VM.start.  Each call waits up to ``timeout`` seconds.

    One Health.Check is sent on a connection that is retried at short intervals.  The guest accepts as soon as the agent
    listens, long before it serves, and answers the pending request.
    """

    def __init__(self, timeout: float = 1.0) -> None:
        self._timeout = timeout
        self._connection: socket.socket | None = None
        self._reader = frames.FrameReader()
        self._began: float | None = None

    def __call__(self, path: str | os.PathLike[str]) -> bool:
        now = time.monotonic()
        self._began = self._began or now
        deadline = now + self._timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                if self._connection is None:
                    self._connect(os.fspath(path), left)
                if (answer := self._receive(left)) is not None:
                    self.close()
                    self._began = None
                    return _is_serving(answer)
            except TimeoutError:
                return False
            except OSError:
                self.close()
                waited = time.monotonic() - (self._began or now)
                time.sleep(min(max(RETRY_INTERVAL, waited * RETRY_SHARE), left))
        return False

    def close(self) -> None:
        """Close its connection; the next call opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self, path: str, timeout: float) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(timeout)
        self._reader = frames.FrameReader()
        self._connection.connect(path)
        self._connection.sendall(frames.request(1, "grpc.Health", "Check", b""))

    def _receive(self, timeout: float) -> frames.Frame | None:
        """Receive once, and return the response when it is complete.  Raises OSError, also if the connection closes."""
        assert self._connection is not None
        self._connection.settimeout(timeout)
        data = self._connection.recv(4096)
        if not data:
            raise ConnectionResetError
        self._reader.feed(data)
        return self._reader.next()


def _is_serving(answer: frames.Frame) -> bool:
    try:
        return wire.value_of(payload_of(answer), STATUS) == SERVING
    except (RpcError, wire.WireError):
        return False


def is_serving(path: str | os.PathLike[str], timeout: float) -> bool:
    """Check whether an agent serves on a socket, waiting up to ``timeout`` seconds for it to start."""
    probe = ReadinessProbe(timeout)
    try:
        return probe(path)
    finally:
        probe.close()

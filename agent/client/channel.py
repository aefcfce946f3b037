"""ttrpc to an agent: connected on the first call, and reconnected if the connection is lost.

`AgentChannel` is the interface of channels; the one for gRPC, for Kata 1.x agents, is in grpc_channel.py.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import Protocol

from caisson.agent.client.errors import AgentError, agent_error, connection_error
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc import frames
from caisson.agent.rpc.ttrpc.client import Client
from caisson.agent.rpc.ttrpc.responses import RpcError, payload_of


class AgentChannel(Protocol):
    """Carry calls to one agent."""

    #: The generation of Kata's API at the other end: 1, which hosts speak over gRPC, or 3, over ttrpc.
    generation: int

    #: Whether cancelling a call here also cancels it in the agent.
    cancels: bool

    #: Whether the agent begins calls in the order in which they are made here.
    in_order: bool

    async def call(self, service: str, method: str, payload: bytes, timeout: float | None) -> bytes:
        """Call a method with an encoded request and a timeout in seconds; returns the encoded response.

        Raises AgentError.
        """

    async def close(self) -> None:
        """Close the connection; calls in progress raise AgentGone."""


class TtrpcChannel:
    """A channel over ttrpc, which cannot cancel calls."""

    generation = 3
    cancels = False
    in_order = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """``path`` is the Unix socket of a VM's agent."""
        self._path = path
        self._client: Client | None = None
        self._connecting = asyncio.Lock()

    async def call(self, service: str, method: str, payload: bytes, timeout: float | None) -> bytes:
        try:
            client = self._client
            if client is None or client.closed:
                client = await self._connect()
            return await client.call(service, method, payload, timeout)
        except RpcError as error:
            raise agent_error(error) from error
        except OSError as error:
            raise connection_error((error.strerror or str(error)).lower()) from error
        except ValueError as error:  # longer than ttrpc carries
            raise AgentError(StatusCode.RESOURCE_EXHAUSTED, str(error)) from error

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def _connect(self) -> Client:
        async with self._connecting:
            if self._client is None or self._client.closed:
                self._client = await Client.connect(self._path)
            return self._client


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
    from google.protobuf.message import DecodeError

    from caisson.proto.kata3 import health_pb2

    try:
        status = health_pb2.HealthCheckResponse.FromString(payload_of(answer)).status
    except (RpcError, DecodeError):
        return False
    return status == health_pb2.HealthCheckResponse.SERVING


def is_serving(path: str | os.PathLike[str], timeout: float) -> bool:
    """Check whether an agent serves on a socket, waiting up to ``timeout`` seconds for it to start."""
    probe = ReadinessProbe(timeout)
    try:
        return probe(path)
    finally:
        probe.close()

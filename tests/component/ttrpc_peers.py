"""Join the ttrpc server and client by a pair of sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from caisson.agent.base.errors import ModelError
from caisson.agent.base.log import Log
from caisson.agent.base.tracing import Tracing
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.connection import Connection
from caisson.agent.rpc.dispatch import Dispatch, Service
from caisson.agent.rpc.server import Server
from caisson.agent.rpc.ttrpc import frames
from caisson.agent.rpc.ttrpc.client import Client, Stub
from caisson.agent.rpc.ttrpc.responses import RpcError
from caisson.proto.kata1 import health_pb2
from caisson.proto.ttrpc import ttrpc_pb2
from tests.support.poll import until

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
Request = health_pb2.CheckRequest


#: Seconds for a server to respond, or to refuse: if a limit is missing, the test must fail, not wait.
TIMEOUT = 60


class Health:
    """Does what the request's `service` says."""

    def __init__(self) -> None:
        self.waiting = self.most_waiting = 0
        self.changed = asyncio.Event()
        self.go = asyncio.Event()

    async def Check(self, request: Any) -> Any:
        if request.service.startswith("wait"):
            self.waiting += 1
            self.changed.set()
            try:
                await self.go.wait()
            finally:
                self.waiting -= 1
                self.changed.set()
        elif request.service == "large":
            return [bytes(frames.MAX_DATA)]
        elif request.service:
            raise ModelError(request.service)
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def Version(self, request: Any) -> Any:
        return health_pb2.VersionCheckResponse(agent_version=request.service)

    async def until_waiting(self, count: int) -> None:
        async with asyncio.timeout(TIMEOUT):
            while self.waiting != count:
                self.changed.clear()
                await self.changed.wait()


def status_of(error: Exception) -> tuple[StatusCode, str] | None:
    return (StatusCode.UNKNOWN, str(error)) if isinstance(error, ModelError) else None


class Pair:
    """A server's connection and the other end of its socket."""

    def __init__(self, server: Server, health: Health, sock: socket.socket) -> None:
        self.server = server
        self.health = health
        self.sock = sock
        self._reader = frames.FrameReader()

    @property
    def connection(self) -> Connection:
        (one,) = self.server._connections
        return one

    async def send(self, *data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, b"".join(data))

    async def receive(self) -> tuple[int, Any]:
        """Return the next response: its stream and message.  Raises EOFError, TimeoutError."""
        while (one := self._reader.next()) is None:
            async with asyncio.timeout(TIMEOUT):
                data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
            if not data:
                raise EOFError
            self._reader.feed(data)
        assert (one.kind, one.flags) == (frames.RESPONSE, 0)
        return one.stream_id, ttrpc_pb2.Response.FromString(bytes(one.data or b""))

    async def error(self) -> tuple[int, StatusCode, str]:
        """Return the next response, which must be an error."""
        stream_id, response = await self.receive()
        assert not response.payload
        return stream_id, StatusCode(response.status.code), response.status.message

    async def still_serves(self, stream_id: int = 999) -> None:
        await self.send(check(stream_id))
        assert await self.receive() == (stream_id, ttrpc_pb2.Response(payload=b"\x08\x01"))


def check(stream_id: int, service: str = "", timeout: float | None = None) -> bytes:
    payload = Request(service=service).SerializeToString()
    return frames.request(stream_id, "grpc.Health", "Check", payload, timeout)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets of TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


@contextlib.asynccontextmanager
async def connected(
    make_pair: Callable[[], tuple[socket.socket, socket.socket]] = socket.socketpair,
) -> AsyncIterator[Pair]:
    """Start a server with one connection; at the end it is lost, and nothing is left of it."""
    loop, health, (ours, theirs) = asyncio.get_running_loop(), Health(), make_pair()
    ours.setblocking(False)
    before, failures = asyncio.all_tasks(), []
    loop.set_exception_handler(lambda _, context: failures.append(context))
    dispatch = Dispatch(Service(HEALTH, Health).bind(health), Log("fatal"), Tracing(""), status_of)
    server = Server(Log("fatal"), ttrpc=dispatch)
    await loop.connect_accepted_socket(server.accept, theirs)
    with ours:
        yield Pair(server, health, ours)
    await until(lambda: not server._connections and asyncio.all_tasks() == before, "nothing is left")
    assert failures == []


@contextlib.asynccontextmanager
async def called() -> AsyncIterator[tuple[Client, Any, Pair]]:
    """Return a client of such a server, its stub and the pair."""
    async with connected() as pair:
        async with await Client.over(pair.sock) as client:
            yield client, Stub(client, HEALTH), pair


async def failed(call: Awaitable[Any]) -> tuple[StatusCode, str]:
    with pytest.raises(RpcError) as caught:
        await call
    return caught.value.code, caught.value.text

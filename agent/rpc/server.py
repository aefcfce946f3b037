"""A server of gRPC and ttrpc on one address: the first byte of a connection tells which one its peer speaks."""

from __future__ import annotations

import asyncio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket
    from typing import Any

    from caisson.agent.base.log import Log
    from caisson.agent.rpc.connection import Connection
    from caisson.agent.rpc.dispatch import Dispatch

#: Bytes received at once.
BUFFER_SIZE = 1 << 18


class Server:
    """Serve any number of connections."""

    def __init__(self, log: Log, *, grpc: Dispatch | None = None, ttrpc: Dispatch | None = None) -> None:
        """A protocol without a dispatch is disabled."""
        self._log = log
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        self._connections: set[Connection] = set()
        self._all_closed: asyncio.Event | None = None
        self._silent: set[asyncio.BaseTransport] = set()  # no input yet on these
        self._protocols: dict[int, tuple[str, Callable[[], Connection]]] = {}
        if grpc is not None:  # of HTTP/2's preface, RFC 9113 section 3.4
            self._protocols[ord("P")] = "grpc", lambda: self._grpc_connection(grpc)
        if ttrpc is not None:  # of a frame's length, which is at most 4 MiB
            self._protocols[0] = "ttrpc", lambda: self._ttrpc_connection(ttrpc)
        #: The protocols used so far, "grpc" and "ttrpc".
        self.spoken: set[str] = set()

    def accept(self) -> asyncio.BufferedProtocol:
        """Create the protocol instance for a new connection."""
        return _FirstByte(self._buffer, self._silent, self._choose)

    async def warm_up(self, service: str, method: str) -> None:
        """Serve one internal ttrpc call with an empty request, and import what gRPC needs.

        In a guest saved afterwards, each clone serves its first host without running cold code.
        """
        from caisson.agent.rpc.http2 import connection, grpc  # noqa: F401
        from caisson.agent.rpc.ttrpc import frames

        loop = asyncio.get_running_loop()
        with await self.connect() as near:
            await loop.sock_sendall(near, frames.request(1, service, method, b""))
            await loop.sock_recv(near, BUFFER_SIZE)

    async def connect(self) -> socket:
        """Return a connection to this server from its own process."""
        from socket import socketpair

        near, far = socketpair()
        near.setblocking(False)
        await asyncio.get_running_loop().connect_accepted_socket(self.accept, far)
        return near

    async def stop(self, grace: float, linger: float = 0.0) -> None:
        """Accept no more requests; those in progress get ``grace`` seconds.  Closes all connections.

        Their clients get ``linger`` seconds to close them first: Go's ttrpc may report a connection that closes right
        after a response as closed, and drop the response (client.go, dispatch).
        """
        for transport in self._silent:
            transport.close()
        calls: list[asyncio.Task[None]] = []
        for connection in self._connections:
            connection.drain()
            calls += connection.calls
        if calls:
            await asyncio.wait(calls, timeout=grace)
        if linger and self._connections:
            self._all_closed = asyncio.Event()
            try:
                await asyncio.wait_for(self._all_closed.wait(), linger)
            except TimeoutError:
                pass
        for connection in list(self._connections):
            connection.close()

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if self._all_closed is not None and not self._connections:
            self._all_closed.set()

    def _choose(self, first: int) -> Connection | None:
        if first not in self._protocols:
            self._log("warning", "closed a connection of an unknown protocol", first_byte=first)
            return None
        protocol, make = self._protocols[first]
        self.spoken.add(protocol)
        connection = make()
        self._connections.add(connection)
        return connection

    # Late imports: a guest needs only one of the two for its first response.

    def _grpc_connection(self, dispatch: Dispatch) -> Connection:
        from functools import partial

        from caisson.agent.rpc.http2 import grpc
        from caisson.agent.rpc.http2.connection import Http2Connection

        largest = grpc.PREFIX_SIZE + grpc.MAX_MESSAGE
        serve = partial(grpc.serve, dispatch)
        return Http2Connection(serve, largest, self._buffer, self._log, self._forget)

    def _ttrpc_connection(self, dispatch: Dispatch) -> Connection:
        from caisson.agent.rpc.ttrpc.server import TtrpcConnection

        return TtrpcConnection(dispatch, self._buffer, self._log, self._forget)


class _FirstByte(asyncio.BufferedProtocol):
    """Wait for the first input of a connection, and switch to its protocol."""

    def __init__(
        self,
        buffer: memoryview,
        silent: set[asyncio.BaseTransport],
        choose: Callable[[int], Connection | None],
    ) -> None:
        """``silent`` holds the transport while it waits; ``choose`` returns the protocol for a first byte."""
        self._buffer = buffer
        self._silent = silent
        self._choose = choose
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._silent.add(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._silent.discard(self._transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        connection = self._choose(self._buffer[0])
        if connection is None:
            self._transport.close()
            return
        self._silent.discard(self._transport)
        self._transport.set_protocol(connection)
        connection.connection_made(self._transport)
        connection.buffer_updated(count)  # they share the buffer

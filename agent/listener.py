"""The agent's address: a socket on vsock (or a Unix socket), and the way from there to the gRPC server.

grpcio's wheels cannot listen on vsock, so connections are relayed to a private Unix socket.  Listening comes before
everything else: a host that connects early waits in the kernel's queue instead of failing.
"""

from __future__ import annotations

import asyncio
import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.log import Log

#: Only the host may drive the agent.  Containers share the guest's vsock address family, which no namespace divides.
HOST_CID = 2
ANY_CID = 0xFFFFFFFF

BACKLOG = 1024
BLOCK = 1 << 18

#: The first byte of an HTTP/2 connection: "PRI * HTTP/2.0" (RFC 9113, section 3.4).
HTTP2 = ord("P")


class AddressError(Exception):
    """The address is no address, or cannot be listened on."""


def listen(address: str) -> socket.socket:
    """A listening socket for ``vsock:PORT`` or ``unix:PATH`` (mode 0600).  Raises AddressError."""
    kind, _, place = address.partition(":")
    try:
        if kind == "vsock" and place.isascii() and place.isdecimal():
            listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            listener.bind((ANY_CID, int(place)))
        elif kind == "unix" and place:  # an empty path would be an address that anybody can connect to (unix(7))
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            before = os.umask(0o177)
            try:
                listener.bind(place)
            finally:
                os.umask(before)
        else:
            raise AddressError(f"{address!r} is no address: vsock:PORT or unix:PATH")
        listener.listen(BACKLOG)
    except (OSError, OverflowError, ValueError) as error:
        raise AddressError(f"cannot listen on {address}: {error}") from error
    listener.setblocking(False)
    return listener


class _Side(asyncio.BufferedProtocol):
    """One side of a relayed connection.  What comes in goes out at the other side, as fast as that takes it.

    Until there is another side it is kept.  (Pausing a transport while it is being made does not hold with every
    Python that asyncio comes with: 3.11.2 reads on.)
    """

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer  # of all sides: what comes in is copied on before anything else can come in
        self.transport: asyncio.Transport | None = None
        self.other: _Side | None = None
        self._early: list[bytes] = []
        self._done = False
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    @staticmethod
    def join(one: _Side, another: _Side) -> None:
        """Let two connected sides exchange what comes in, and what has come."""
        one.other, another.other = another, one
        for side in (one, another):
            side._catch_up()

    def _catch_up(self) -> None:
        assert self.other is not None and self.other.transport is not None
        for data in self._early:
            self.other.transport.write(data)
        self._early.clear()
        if self._lost:
            self.other.transport.close()
        elif self._done:
            self._pass_end()
            if self.other._done:
                self.other.transport.close()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        data = bytes(self._buffer[:count])
        if self.other is None or self.other.transport is None:
            self._early.append(data)
        else:
            self.other.transport.write(data)

    def eof_received(self) -> bool:
        self._done = True
        if self.other is None:
            return True
        self._pass_end()
        return not self.other._done  # keep this side open for what still comes the other way

    def _pass_end(self) -> None:
        assert self.other is not None and self.other.transport is not None
        if self.other.transport.can_write_eof() and not self.other.transport.is_closing():
            self.other.transport.write_eof()

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None and not self.other._done:
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        if self.other is not None and self.other.transport is not None:
            if error is not None:
                self.other.transport.abort()
            else:
                self.other.transport.close()


class Relay:
    """Accepts connections and joins each to the gRPC server's private socket."""

    def __init__(self, listener: socket.socket, target: str, log: Log) -> None:
        self._listener = listener
        self._target = target
        self._log = log
        self._buffer = memoryview(bytearray(BLOCK))
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Accept until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(self._listener)
            except OSError as error:
                # Out of descriptors, most likely: those who wait are served when some come back.
                self._log("error", "accept failed", error=str(error))
                await asyncio.sleep(0.1)
                continue
            if connection.family == socket.AF_VSOCK and peer[0] != HOST_CID:
                self._log("warning", "refused a connection that is not the host's", cid=peer[0])
                connection.close()
                continue
            task = loop.create_task(self._join(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _join(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            first = await _first_byte(connection)
            if first is None:
                connection.close()
                return
            if first != HTTP2:
                self._log("warning", "closed a connection that does not speak gRPC", first_byte=first)
                connection.close()
                return
            here, there = _Side(self._buffer), _Side(self._buffer)
            inward, _ = await loop.create_unix_connection(lambda: there, self._target)
            try:
                await loop.connect_accepted_socket(lambda: here, connection)
            except BaseException:
                inward.abort()
                raise
            _Side.join(here, there)
        except OSError as error:
            self._log("warning", "a connection could not be relayed", error=str(error))
            connection.close()


async def _first_byte(connection: socket.socket) -> int | None:
    """Look at what comes first, without taking it; None for a connection that ends before it says anything."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(connection, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(connection)
    try:
        data = connection.recv(1, socket.MSG_PEEK)
    except OSError:
        return None
    return data[0] if data else None

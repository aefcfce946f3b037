"""A ttrpc client on asyncio: any number of concurrent calls over one connection.

The server may be hostile (a guest is): a frame beyond ttrpc's 4 MiB is discarded, and an unexpected response is
dropped.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Self

from google.protobuf import message_factory
from google.protobuf.message import DecodeError

from caisson.agent.base.aio import connect_unix
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc import frames
from caisson.agent.rpc.ttrpc.responses import MAX_STREAM_ID, ConnectionClosed, RpcError, payload_of

Metadata = Iterable[tuple[str, str]]


class Client(asyncio.Protocol):
    """A connection to a ttrpc server; made by ``connect`` or ``over``."""

    def __init__(self) -> None:
        self._reader = frames.FrameReader()
        self._pending: dict[int, asyncio.Future[bytes]] = {}
        self._transport: asyncio.Transport | None = None
        self._next_id = 1
        self._writable = asyncio.Event()
        self._closed = asyncio.Event()

    @classmethod
    async def connect(cls, path: str | os.PathLike[str]) -> Self:
        """Connect to a Unix socket.  Raises OSError."""
        return await cls.over(await connect_unix(path))

    @classmethod
    async def over(cls, connected: socket.socket) -> Self:
        """Speak over a connected stream socket (vsock, or hybrid vsock after its handshake), which it then owns."""
        _, client = await asyncio.get_running_loop().create_connection(cls, sock=connected)
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def closed(self) -> bool:
        """Whether no more calls can be made: the connection is closed, or out of stream ids."""
        return self._transport is None or self._transport.is_closing() or self._next_id > MAX_STREAM_ID

    async def close(self) -> None:
        """Close the connection; calls in progress raise ConnectionClosed."""
        if self._transport is not None:
            self._transport.abort()
        await self._closed.wait()

    async def call(
        self, service: str, method: str, payload: bytes, timeout: float | None = None, metadata: Metadata = ()
    ) -> bytes:
        """Call a method with an encoded request, and return the encoded response.

        ``timeout`` in seconds applies at the server and here.  Raises RpcError, ConnectionClosed, and ValueError for a
        request that is too long.
        """
        if timeout is None:
            return await self._call(service, method, payload, timeout, metadata)
        deadline = asyncio.timeout(timeout)
        try:
            async with deadline:
                return await self._call(service, method, payload, timeout, metadata)
        except TimeoutError:
            if deadline.expired():
                raise RpcError(StatusCode.DEADLINE_EXCEEDED, f"{method}: no response within {timeout:g} s") from None
            raise

    async def _call(
        self, service: str, method: str, payload: bytes, timeout: float | None, metadata: Metadata
    ) -> bytes:
        if self._transport is not None:
            await self._writable.wait()
        if self._transport is None or self._transport.is_closing():
            raise ConnectionClosed
        stream_id, self._next_id = self._next_id, self._next_id + 2
        if stream_id > MAX_STREAM_ID:
            raise ConnectionClosed("the connection has no stream ids left")
        request = frames.request(stream_id, service, method, payload, timeout, metadata)
        response: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._pending[stream_id] = response
        try:
            self._transport.write(request)
            return await response
        finally:
            del self._pending[stream_id]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (frame := self._reader.next()) is not None:
            pending = self._pending.get(frame.stream_id)
            if frame.kind != frames.RESPONSE or pending is None or pending.done():
                continue  # its call was cancelled
            try:
                pending.set_result(payload_of(frame))
            except RpcError as error:
                pending.set_exception(error)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._writable.set()  # its waiter will see that it is closed
        self._closed.set()
        for pending in self._pending.values():
            if not pending.done():
                pending.set_exception(ConnectionClosed())


class Stub:
    """A service's methods as coroutines: ``await stub.Check(request, timeout=5)`` returns its response.

    They raise the same as Client.call.
    """

    def __init__(self, client: Client, descriptor: Any) -> None:
        self._client = client
        self._service = descriptor.full_name
        self._responses = {
            method.name: message_factory.GetMessageClass(method.output_type) for method in descriptor.methods
        }

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        if name not in self._responses:
            raise AttributeError(f"{self._service}: no method {name}")
        response_class = self._responses[name]

        async def call(request: Any, timeout: float | None = None, metadata: Metadata = ()) -> Any:
            payload = await self._client.call(self._service, name, request.SerializeToString(), timeout, metadata)
            try:
                return response_class.FromString(payload)
            except DecodeError:
                text = f"{name}: the response is not a valid {response_class.DESCRIPTOR.name}"
                raise RpcError(StatusCode.INTERNAL, text) from None

        return call

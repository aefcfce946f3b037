"""Provide an HTTP/2 peer that sends exactly what a test specifies."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import pytest

from caisson.agent.base.log import Log
from caisson.agent.rpc.http2 import frames
from caisson.agent.rpc.http2.connection import Http2Connection
from caisson.agent.rpc.http2.frames import Code
from caisson.agent.rpc.http2.hpack import encode
from caisson.agent.rpc.http2.messages import HttpRequest, HttpResponse

FIELDS = (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/echo"), (b":authority", b"x")
BLOCK = encode(*FIELDS)
HEAD, TAIL = encode((b":status", b"200")), encode((b"grpc-status", b"0"))
LARGEST = 1 << 18
TIMEOUT = 60  # seconds: if a limit is missing, the test must fail, not wait
END = frames.END_STREAM | frames.END_HEADERS


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return frames.header(len(payload), kind, flags, stream) + payload


def request(stream: int, body: bytes = b"", block: bytes = BLOCK) -> bytes:
    """Return a request whose body is in frames of 16 KiB."""
    whole = frame(frames.HEADERS, block, frames.END_HEADERS, stream)
    for at in range(0, len(body), frames.DEFAULT_FRAME_SIZE):
        whole += frame(frames.DATA, body[at : at + frames.DEFAULT_FRAME_SIZE], 0, stream)
    return whole + frame(frames.DATA, b"", frames.END_STREAM, stream)


class Peer:
    """The client's end of a connection."""

    def __init__(self, sock: socket.socket, server: Http2Connection, lines: list[tuple[Any, ...]]) -> None:
        self._sock = sock
        self._got = b""
        self.server = server
        self.lines = lines
        self.others: list[Frame] = []

    async def send(self, *data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, b"".join(data))

    async def hello(self, *settings: tuple[int, int]) -> None:
        await self.send(frames.PREFACE, frames.settings(dict(settings)))
        kinds = [(await self.frame()).kind for _ in range(3)]
        assert kinds == [frames.SETTINGS, frames.WINDOW_UPDATE, frames.SETTINGS]

    async def frame(self) -> Frame:
        """Read the next frame.  Raises EOFError, TimeoutError."""
        while True:
            if len(self._got) >= frames.HEADER_SIZE:
                size, kind, flags, stream = frames.parse_header(self._got, 0)
                end = frames.HEADER_SIZE + size
                if len(self._got) >= end:
                    payload, self._got = self._got[frames.HEADER_SIZE : end], self._got[end:]
                    return Frame(kind, flags, stream, payload)
            try:
                async with asyncio.timeout(TIMEOUT):
                    data = await asyncio.get_running_loop().sock_recv(self._sock, 1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                raise EOFError
            self._got += data

    async def answer(self, stream: int) -> bytes:
        """Return the body of a response with no other frames in between."""
        assert await self.frame() == (frames.HEADERS, frames.END_HEADERS, stream, HEAD)
        body = b""
        while (got := await self.frame()).kind == frames.DATA:
            assert got.stream == stream
            body += got.payload
        assert got == (frames.HEADERS, END, stream, TAIL)
        return body

    async def goodbye(self) -> Code:
        """Return why the server closes the connection."""
        while (got := await self.frame()).kind != frames.GOAWAY:
            pass
        with pytest.raises(EOFError):
            await self.frame()
        return Code(int.from_bytes(got.payload[4:8], "big"))

    async def still_there(self) -> None:
        """Check that the connection still works."""
        await self.send(frame(frames.PING, b"12345678"))
        assert await self.frame() == (frames.PING, frames.ACK, 0, b"12345678")

    async def still_there_among_responses(self) -> None:
        """Check that the connection works; keep frames before the response in `others`."""
        await self.send(frame(frames.PING, b"12345678"))
        while (got := await self.frame()).kind != frames.PING:
            self.others.append(got)


async def echo(one: HttpRequest) -> HttpResponse:
    return HttpResponse(HEAD, [bytes(one.body)], TAIL)


@contextlib.asynccontextmanager
async def connected(serve: Callable[[HttpRequest], Awaitable[HttpResponse]] = echo) -> AsyncIterator[Peer]:
    """Connect a peer.  At the end the connection is lost, and nothing is left of it."""
    loop, lines, ours, theirs = asyncio.get_running_loop(), [], *socket.socketpair()
    ours.setblocking(False)
    before, failures = asyncio.all_tasks(), []
    loop.set_exception_handler(lambda _, context: failures.append(context))

    class Lines(Log):
        def __call__(self, level: str, message: str, **fields: object) -> None:
            lines.append((level, message, fields))

    lost = asyncio.Event()
    connection = Http2Connection(serve, LARGEST, memoryview(bytearray(4096)), Lines(), lambda _: lost.set())
    await loop.connect_accepted_socket(lambda: connection, theirs)
    with ours:
        yield Peer(ours, connection, lines)
    await lost.wait()
    assert not connection._streams and not connection._flow.blocked
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert failures == []


class Never:
    """Never responds, and records cancelled calls."""

    def __init__(self) -> None:
        self.begun = self.given_up = 0
        self.changed = asyncio.Event()

    async def __call__(self, one: HttpRequest) -> HttpResponse:
        self.begun += 1
        self.changed.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.given_up += 1
            self.changed.set()
        raise AssertionError

    async def until(self, begun: int, given_up: int) -> None:
        async with asyncio.timeout(TIMEOUT):
            while (self.begun, self.given_up) != (begun, given_up):
                self.changed.clear()
                await self.changed.wait()


LARGE = (1 << 31) - 1
OPEN = frame(frames.HEADERS, BLOCK, frames.END_HEADERS, 1)

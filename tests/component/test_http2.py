"""An HTTP/2 connection, by a peer that says exactly what a test wants it to."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import pytest

from caisson.agent.base.log import Log
from caisson.agent.rpc.http2 import connection as module
from caisson.agent.rpc.http2 import frames
from caisson.agent.rpc.http2.connection import Http2Connection
from caisson.agent.rpc.http2.frames import Code
from caisson.agent.rpc.http2.hpack import Decoder, encode
from caisson.agent.rpc.http2.messages import HttpRequest, HttpResponse

FIELDS = (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/echo"), (b":authority", b"x")
BLOCK = encode(*FIELDS)
HEAD, TAIL = encode((b":status", b"200")), encode((b"grpc-status", b"0"))
LARGEST = 1 << 18
END = frames.END_STREAM | frames.END_HEADERS


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return frames.header(len(payload), kind, flags, stream) + payload


def request(stream: int, body: bytes = b"", block: bytes = BLOCK) -> bytes:
    """A request whose body is in frames of 16 KiB."""
    whole = frame(frames.HEADERS, block, frames.END_HEADERS, stream)
    for at in range(0, len(body), frames.DEFAULT_FRAME_SIZE):
        whole += frame(frames.DATA, body[at : at + frames.DEFAULT_FRAME_SIZE], 0, stream)
    return whole + frame(frames.DATA, b"", frames.END_STREAM, stream)


class Peer:
    """A client's end of a connection."""

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
        """The next frame.  Raises EOFError."""
        while True:
            if len(self._got) >= frames.HEADER_SIZE:
                size, kind, flags, stream = frames.parse_header(self._got, 0)
                end = frames.HEADER_SIZE + size
                if len(self._got) >= end:
                    payload, self._got = self._got[frames.HEADER_SIZE : end], self._got[end:]
                    return Frame(kind, flags, stream, payload)
            try:
                data = await asyncio.get_running_loop().sock_recv(self._sock, 1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                raise EOFError
            self._got += data

    async def answer(self, stream: int) -> bytes:
        """The body of an answer that comes without anything between."""
        assert await self.frame() == (frames.HEADERS, frames.END_HEADERS, stream, HEAD)
        body = b""
        while (got := await self.frame()).kind == frames.DATA:
            assert got.stream == stream
            body += got.payload
        assert got == (frames.HEADERS, END, stream, TAIL)
        return body

    async def goodbye(self) -> Code:
        """Why the server ends the connection."""
        while (got := await self.frame()).kind != frames.GOAWAY:
            pass
        with pytest.raises(EOFError):
            await self.frame()
        return Code(int.from_bytes(got.payload[4:8], "big"))

    async def still_there(self) -> None:
        """The connection works."""
        await self.send(frame(frames.PING, b"12345678"))
        assert await self.frame() == (frames.PING, frames.ACK, 0, b"12345678")

    async def still_there_among_responses(self) -> None:
        """The connection works; what comes before the answer is kept in `others`."""
        await self.send(frame(frames.PING, b"12345678"))
        while (got := await self.frame()).kind != frames.PING:
            self.others.append(got)


async def echo(one: HttpRequest) -> HttpResponse:
    return HttpResponse(HEAD, [bytes(one.body)], TAIL)


@contextlib.asynccontextmanager
async def connected(serve: Callable[[HttpRequest], Awaitable[HttpResponse]] = echo) -> AsyncIterator[Peer]:
    """A peer of a connection.  At the end it is lost, and nothing is left of it."""
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


async def test_a_request_and_its_answer() -> None:
    async with connected() as peer:
        await peer.hello()
        for stream, body in ((1, b"hello"), (3, b""), (5, bytes(range(256)) * 200)):
            await peer.send(request(stream, body))
            assert await peer.answer(stream) == body


async def test_bytes_that_come_one_by_one() -> None:
    async with connected() as peer:
        for byte in frames.PREFACE + frames.settings({}) + request(1, b"hello"):
            await peer.send(bytes([byte]))
            await asyncio.sleep(0)
        for _ in range(3):
            await peer.frame()
        assert await peer.answer(1) == b"hello"


async def test_headers_in_pieces_with_padding_and_priority_and_fields_after_the_body() -> None:
    async with connected() as peer:
        await peer.hello()
        padded = b"\3" + b"\0\0\0\0\x10" + BLOCK[:5] + bytes(3)
        await peer.send(
            frame(frames.HEADERS, padded, frames.PADDED | frames.PRIORITIZED, 1),
            frame(frames.CONTINUATION, BLOCK[5:7], 0, 1),
            frame(frames.CONTINUATION, BLOCK[7:], frames.END_HEADERS, 1),
            frame(frames.DATA, b"\2ab\0\0", frames.PADDED, 1),
            frame(frames.DATA, b"c", 0, 1),
            frame(0xBE, b"a frame of the future"),
            frame(frames.PRIORITY, bytes(5), 0, 7),
            frame(frames.HEADERS, encode((b"x", b"y")), END, 1),
        )
        assert await peer.answer(1) == b"abc"


async def test_an_answer_of_headers_alone() -> None:
    async def no(one: HttpRequest) -> HttpResponse:
        return HttpResponse(HEAD)

    async with connected(no) as peer:
        await peer.hello()
        await peer.send(request(1))
        assert await peer.frame() == (frames.HEADERS, END, 1, HEAD)
        await peer.still_there()


async def test_an_answer_is_sent_as_there_is_room() -> None:
    data = random.Random(1).randbytes(70_000)

    async def large(one: HttpRequest) -> HttpResponse:
        return HttpResponse(HEAD, [data[:5], b"", data[5:]], TAIL)

    async with connected(large) as peer:
        await peer.hello((frames.INITIAL_WINDOW_SIZE, 10))
        await peer.send(request(1))
        assert (await peer.frame()).kind == frames.HEADERS
        assert (await peer.frame()).payload == data[:10]
        await peer.still_there()  # and nothing more
        await peer.send(frames.number(frames.WINDOW_UPDATE, 1, 7))
        assert (await peer.frame()).payload == data[10:17]
        # Settings change the window of a stream that is open, too: to less than nothing, and back (6.9.2).
        await peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 5}))
        assert (await peer.frame()).flags == frames.ACK
        await peer.send(frames.number(frames.WINDOW_UPDATE, 1, 5))
        await peer.still_there()
        await peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 100_000}))
        assert (await peer.frame()).flags == frames.ACK
        rest = b""
        while len(rest) < frames.DEFAULT_WINDOW - 17:  # what the connection's window lets through
            got = await peer.frame()
            assert 0 < len(got.payload) <= frames.DEFAULT_FRAME_SIZE
            rest += got.payload
        assert rest == data[17 : frames.DEFAULT_WINDOW]
        await peer.still_there()
        await peer.send(frames.number(frames.WINDOW_UPDATE, 0, 100_000))
        assert (await peer.frame()).payload == data[frames.DEFAULT_WINDOW :]
        assert (await peer.frame()).payload == TAIL


async def test_answers_share_the_room_of_their_connection() -> None:
    async def large(one: HttpRequest) -> HttpResponse:
        return HttpResponse(HEAD, [bytes(100_000)], TAIL)

    async with connected(large) as peer:
        await peer.hello((frames.INITIAL_WINDOW_SIZE, 1 << 20), (frames.MAX_FRAME_SIZE, 1 << 20))
        await peer.send(request(1), request(3), request(5))
        got = {1: 0, 3: 0, 5: 0}
        turns = []
        while sum(got.values()) < 300_000:
            one = await peer.frame()
            if one.kind == frames.DATA:
                got[one.stream] += len(one.payload)
                turns.append(one.stream)
                await peer.send(frames.number(frames.WINDOW_UPDATE, 0, 1000))
        assert got == dict.fromkeys(got, 100_000)
        assert {1, 3, 5} <= set(turns[:10])


async def test_frames_are_as_large_as_the_peer_lets_them_be() -> None:
    async def large(one: HttpRequest) -> HttpResponse:
        return HttpResponse(HEAD, [bytes(60_000)], TAIL)

    async with connected(large) as peer:
        await peer.hello((frames.MAX_FRAME_SIZE, 50_000))
        await peer.send(request(1))
        assert [len((await peer.frame()).payload) for _ in range(3)][1:] == [50_000, 10_000]


class Never:
    """Answers nothing, and tells of who gave up."""

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
        while (self.begun, self.given_up) != (begun, given_up):
            self.changed.clear()
            await self.changed.wait()


async def test_reset_stream_cancels_its_handler() -> None:
    never = Never()
    async with connected(never) as peer:
        await peer.hello()
        await peer.send(request(1), request(3), request(5))
        await never.until(3, 0)
        await peer.send(frames.number(frames.RST_STREAM, 3, Code.CANCEL))
        await never.until(3, 1)
        await peer.still_there()
    await never.until(3, 3)


async def test_an_end_of_file_is_a_peer_that_has_gone() -> None:
    never = Never()
    async with connected(never) as peer:
        await peer.hello()
        await peer.send(request(1))
        await never.until(1, 0)
        peer._sock.shutdown(socket.SHUT_WR)
        await never.until(1, 1)


async def test_a_body_that_is_too_long_is_cut_and_answered() -> None:
    seen: list[int] = []

    async def look(one: HttpRequest) -> HttpResponse:
        seen.append(len(one.body))
        return HttpResponse(HEAD)

    async with connected(look) as peer:
        await peer.hello()
        await peer.send(frame(frames.HEADERS, BLOCK, frames.END_HEADERS, 1))
        piece = frame(frames.DATA, bytes(frames.DEFAULT_FRAME_SIZE), 0, 1)
        await peer.send(*[piece] * (LARGEST // frames.DEFAULT_FRAME_SIZE + 1))
        assert await peer.frame() == (frames.HEADERS, END, 1, HEAD)
        assert await peer.frame() == (frames.RST_STREAM, 0, 1, bytes(4))
        await peer.send(piece)  # was on its way: ignored
        await peer.still_there()
        assert LARGEST < seen[0] <= LARGEST + frames.DEFAULT_FRAME_SIZE


async def test_room_for_data_is_given_back() -> None:
    async with connected() as peer:
        await peer.hello((frames.INITIAL_WINDOW_SIZE, 1 << 20))
        room, sent, stream = module.WINDOW, 0, 1
        while sent < 2 * module.WINDOW:
            await peer.send(request(stream, bytes(LARGEST)))
            sent += LARGEST
            room -= LARGEST
            assert room >= 0
            await peer.send(frames.number(frames.WINDOW_UPDATE, 0, LARGEST))
            while not ((got := await peer.frame()).kind == frames.HEADERS and got.flags & frames.END_STREAM):
                if got.kind == frames.WINDOW_UPDATE:
                    room += int.from_bytes(got.payload, "big")
            stream += 2


async def test_more_requests_than_there_may_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CALLS", 3)

    never = Never()
    async with connected(never) as peer:
        await peer.hello()
        await peer.send(*[request(stream) for stream in (1, 3, 5, 7)])
        refused = Frame(frames.RST_STREAM, 0, 7, Code.REFUSED_STREAM.to_bytes(4, "big"))
        assert await peer.frame() == refused
        await never.until(3, 0)


async def test_a_server_that_leaves_answers_what_has_begun() -> None:
    go = asyncio.Event()

    async def slow(one: HttpRequest) -> HttpResponse:
        await go.wait()
        return await echo(one)

    async with connected(slow) as peer:
        await peer.hello()
        await peer.send(request(1, b"x"))
        await peer.still_there()
        peer.server.leave()
        got = await peer.frame()
        assert (got.kind, got.payload) == (frames.GOAWAY, (1).to_bytes(4, "big") + bytes(4))
        await peer.send(frame(frames.HEADERS, BLOCK, END, 3))
        assert (await peer.frame()).payload == Code.REFUSED_STREAM.to_bytes(4, "big")
        assert len(peer.server.calls) == 1
        go.set()
        assert await peer.answer(1) == b"x"
        peer.server.close()


async def test_server_stops_reading_from_a_peer_that_does_not_read() -> None:
    async with connected() as peer:
        await peer.hello()
        ping, sent = frame(frames.PING, bytes(8)) * 1000, 0
        with pytest.raises(TimeoutError):
            while sent < 1 << 26:
                async with asyncio.timeout(1):
                    await peer.send(ping)
                sent += len(ping)
        # What the sockets take, and some.
        assert sent < 1 << 23


async def test_responses_that_the_peer_does_not_take_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HELD", 1 << 20)

    async def large(one: HttpRequest) -> HttpResponse:
        return HttpResponse(HEAD, [bytes(200_000)], TAIL)

    async with connected(large) as peer:
        await peer.hello((frames.INITIAL_WINDOW_SIZE, 0))
        for stream in range(1, 101, 2):
            await peer.send(request(stream))
            await peer.still_there_among_responses()
        assert peer.server.held <= (1 << 20) + 200_000  # a call that has begun may end
        resets = [one for one in peer.others if one.kind == frames.RST_STREAM]
        assert len(resets) > 40
        assert {one.payload for one in resets} == {Code.ENHANCE_YOUR_CALM.to_bytes(4, "big")}
        await peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 20}))
        await peer.send(frames.number(frames.WINDOW_UPDATE, 0, 1 << 24))
        taken = 0
        while taken < 5 * 200_000:
            taken += len(one.payload) if (one := await peer.frame()).kind == frames.DATA else 0
        await peer.still_there_among_responses()
        assert peer.server.held == 0


LARGE = (1 << 31) - 1
OPEN = frame(frames.HEADERS, BLOCK, frames.END_HEADERS, 1)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(frames.DATA, b"x", 0, 0), Code.PROTOCOL_ERROR),
        (frame(frames.DATA, b"x", 0, 1), Code.PROTOCOL_ERROR),
        (OPEN + frame(frames.DATA, b"\2a", frames.PADDED, 1), Code.PROTOCOL_ERROR),
        (OPEN + frame(frames.DATA, b"", frames.PADDED, 1), Code.PROTOCOL_ERROR),
        (frames.header(module.MAX_FRAME_SIZE + 1, frames.DATA, 0, 1), Code.FRAME_SIZE_ERROR),
        (frame(frames.HEADERS, BLOCK, END, 2), Code.PROTOCOL_ERROR),
        (frame(frames.HEADERS, b"\x80", END, 1), Code.COMPRESSION_ERROR),
        (frame(frames.HEADERS, BLOCK, 0, 1) + frame(frames.PING, bytes(8)), Code.PROTOCOL_ERROR),
        (frame(frames.HEADERS, BLOCK, 0, 1) + frame(frames.CONTINUATION, b"", 0, 3), Code.PROTOCOL_ERROR),
        (frame(frames.HEADERS, bytes(60_000), 0, 1) + frame(frames.CONTINUATION, bytes(6000), 0, 1),
         Code.ENHANCE_YOUR_CALM),
        (frame(frames.CONTINUATION, BLOCK, END, 1), Code.PROTOCOL_ERROR),
        (frame(frames.RST_STREAM, bytes(4), 0, 1), Code.PROTOCOL_ERROR),
        (OPEN + frame(frames.RST_STREAM, bytes(5), 0, 1), Code.FRAME_SIZE_ERROR),
        (frame(frames.SETTINGS, b"", 0, 1), Code.PROTOCOL_ERROR),
        (frame(frames.SETTINGS, bytes(5)), Code.FRAME_SIZE_ERROR),
        (frame(frames.SETTINGS, bytes(6), frames.ACK), Code.FRAME_SIZE_ERROR),
        (frames.settings({frames.ENABLE_PUSH: 2}), Code.PROTOCOL_ERROR),
        (frames.settings({frames.INITIAL_WINDOW_SIZE: LARGE + 1}), Code.FLOW_CONTROL_ERROR),
        (frames.settings({frames.MAX_FRAME_SIZE: 100}), Code.PROTOCOL_ERROR),
        (frames.settings({frames.MAX_FRAME_SIZE: 1 << 24}), Code.PROTOCOL_ERROR),
        (frame(frames.PING, bytes(7)), Code.FRAME_SIZE_ERROR),
        (frame(frames.PING, bytes(8), 0, 1), Code.PROTOCOL_ERROR),
        (frame(frames.GOAWAY, bytes(8), 0, 1), Code.PROTOCOL_ERROR),
        (frame(frames.PUSH_PROMISE, bytes(8), 0, 1), Code.PROTOCOL_ERROR),
        (frame(frames.WINDOW_UPDATE, bytes(3)), Code.FRAME_SIZE_ERROR),
        (frames.number(frames.WINDOW_UPDATE, 0, 0), Code.PROTOCOL_ERROR),
        (frames.number(frames.WINDOW_UPDATE, 0, LARGE), Code.FLOW_CONTROL_ERROR),
        (frames.number(frames.WINDOW_UPDATE, 1, 1), Code.PROTOCOL_ERROR),
    ],
)  # fmt: skip
async def test_connection_errors(sent: bytes, code: Code) -> None:
    async with connected() as peer:
        await peer.hello()
        await peer.send(sent)
        assert await peer.goodbye() is code
        ((level, text, _),) = peer.lines
        assert (level, text) == ("warning", "closed a connection that violates HTTP/2")


async def test_settings_come_first() -> None:
    async with connected() as peer:
        await peer.send(frames.PREFACE, frame(frames.PING, bytes(8)))
        assert await peer.goodbye() is Code.PROTOCOL_ERROR


def with_fields(*fields: tuple[bytes, bytes]) -> bytes:
    return frame(frames.HEADERS, encode(*fields), END, 1)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(frames.PRIORITY, bytes(4), 0, 1), Code.FRAME_SIZE_ERROR),
        (frame(frames.PRIORITY, b"\0\0\0\1\0", 0, 1), Code.PROTOCOL_ERROR),
        (OPEN + frames.number(frames.WINDOW_UPDATE, 1, 0), Code.PROTOCOL_ERROR),
        (OPEN + frames.number(frames.WINDOW_UPDATE, 1, LARGE), Code.FLOW_CONTROL_ERROR),
        (OPEN + frame(frames.HEADERS, encode((b"x", b"y")), frames.END_HEADERS, 1), Code.PROTOCOL_ERROR),
        (OPEN + frame(frames.HEADERS, BLOCK, END, 1), Code.PROTOCOL_ERROR),
        (with_fields(*FIELDS[1:]), Code.PROTOCOL_ERROR),
        (with_fields(*FIELDS[:2]), Code.PROTOCOL_ERROR),
        (with_fields(*FIELDS, (b":path", b"/")), Code.PROTOCOL_ERROR),
        (with_fields(*FIELDS, (b":new", b"/")), Code.PROTOCOL_ERROR),
        (with_fields((b"x", b"y"), *FIELDS), Code.PROTOCOL_ERROR),
        (with_fields(*FIELDS, (b"X", b"y")), Code.PROTOCOL_ERROR),
        (with_fields(*FIELDS, (b"connection", b"close")), Code.PROTOCOL_ERROR),
        (with_fields(*FIELDS, (b"te", b"gzip")), Code.PROTOCOL_ERROR),
        (with_fields(*FIELDS, (b"content-length", b"1")), Code.PROTOCOL_ERROR),
    ],
)
async def test_stream_errors(sent: bytes, code: Code) -> None:
    async with connected() as peer:
        await peer.hello()
        await peer.send(sent)
        assert await peer.frame() == (frames.RST_STREAM, 0, 1, code.to_bytes(4, "big"))
        await peer.send(request(3, b"x"))
        assert await peer.answer(3) == b"x"
        assert peer.lines == []


async def test_a_request_that_has_ended_takes_nothing_more() -> None:
    never = Never()
    async with connected(never) as peer:
        await peer.hello()
        await peer.send(request(1), frame(frames.DATA, b"x", 0, 1))
        assert (await peer.frame()).payload == Code.STREAM_CLOSED.to_bytes(4, "big")
        # What is still on its way to a stream that was reset is ignored.
        await peer.send(frames.number(frames.WINDOW_UPDATE, 1, 1), frame(frames.DATA, b"x", 0, 1) * 1000)
        await peer.send(frame(frames.HEADERS, BLOCK, END, 1))
        await peer.still_there()


async def test_a_stream_that_is_closed_takes_nothing_more() -> None:
    async with connected() as peer:
        await peer.hello()
        await peer.send(request(1))
        await peer.answer(1)
        await peer.send(frames.number(frames.WINDOW_UPDATE, 1, 1), frame(frames.DATA, b"x", 0, 1))
        assert (await peer.frame()).payload == Code.STREAM_CLOSED.to_bytes(4, "big")
        await peer.send(request(3))
        await peer.answer(3)
        await peer.send(frame(frames.HEADERS, BLOCK, END, 3))
        assert await peer.goodbye() is Code.STREAM_CLOSED


@pytest.mark.parametrize("first", [b"\0", b"G", b"\x16\x03\x01", b"PRI * HTTP/1.1"], ids=["ttrpc", "1", "tls", "1.1"])
async def test_other_protocols_are_closed_with_a_word_in_the_log(first: bytes) -> None:
    async with connected() as peer:
        await peer.send(first)
        with pytest.raises(EOFError):
            await peer.frame()
        ((level, text, fields),) = peer.lines
        assert (level, fields) == ("warning", {"first_byte": first[0]})
        assert "does not speak HTTP/2" in text


async def test_anything_at_all_is_survived() -> None:
    """Frames of chance, most of them wrong somewhere: there are answers, or an end, and no exception."""
    chance = random.Random(7)

    def some() -> bytes:
        kind = chance.choice([*range(10), 200])
        payload = chance.choice(
            [b"", bytes(4), bytes(5), bytes(8), BLOCK, BLOCK[: chance.randrange(20)], chance.randbytes(40)]
        )
        whole = frame(kind, payload, chance.choice([0, 1, 4, 5, 8, 0x20, chance.randrange(256)]), chance.randrange(9))
        return whole if chance.random() < 0.9 else whole[: chance.randrange(len(whole))]

    for _ in range(1000):
        async with connected() as peer:
            with contextlib.suppress(ConnectionError):
                await peer.send(frames.PREFACE, frames.settings({}), *[some() for _ in range(8)])
                peer._sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(EOFError):
                while True:
                    await peer.frame()


async def test_headers_are_what_was_sent() -> None:
    seen: list[dict[bytes, bytes]] = []

    async def look(one: HttpRequest) -> HttpResponse:
        seen.append(one.headers)
        return HttpResponse(HEAD)

    async with connected(look) as peer:
        await peer.hello()
        await peer.send(with_fields(*FIELDS, (b"content-type", b"application/grpc")))
        got = await peer.frame()
        assert Decoder(1000).decode(got.payload) == [(b":status", b"200")]
        assert seen == [{**dict(FIELDS), b"content-type": b"application/grpc"}]

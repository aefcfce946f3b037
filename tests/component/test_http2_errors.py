"""Test HTTP/2 requests that no peer should send: stream and connection errors, and arbitrary frames."""

from __future__ import annotations

import contextlib
import random
import socket

import pytest

from caisson.agent.rpc.http2 import connection as module
from caisson.agent.rpc.http2 import frames
from caisson.agent.rpc.http2.frames import Code
from caisson.agent.rpc.http2.hpack import Decoder, encode
from caisson.agent.rpc.http2.messages import HttpRequest, HttpResponse
from tests.component.http2_peer import BLOCK, END, FIELDS, HEAD, LARGE, OPEN, Never, connected, frame, request
from tests.support import fuzz


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
        # Frames in flight to a stream that was reset are ignored.
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


@pytest.mark.fuzz
@pytest.mark.timeout(fuzz.LIMIT)
async def test_anything_at_all_is_survived() -> None:
    """Random frames, most of them invalid somewhere: the server responds or closes, without an exception."""

    def some(chance: random.Random) -> bytes:
        kind = chance.choice([*range(10), 200])
        payload = chance.choice(
            [b"", bytes(4), bytes(5), bytes(8), BLOCK, BLOCK[: chance.randrange(20)], chance.randbytes(40)]
        )
        whole = frame(kind, payload, chance.choice([0, 1, 4, 5, 8, 0x20, chance.randrange(256)]), chance.randrange(9))
        return whole if chance.random() < 0.9 else whole[: chance.randrange(len(whole))]

    for one in fuzz.rounds(1000):
        with one as chance:
            async with connected() as peer:
                with contextlib.suppress(ConnectionError):
                    await peer.send(frames.PREFACE, frames.settings({}), *[some(chance) for _ in range(8)])
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

"""Test an HTTP/2 connection, with a peer that sends exactly what a test specifies."""

from __future__ import annotations

import asyncio
import random
import socket

import pytest

from caisson.agent.rpc.http2 import connection as module
from caisson.agent.rpc.http2 import frames
from caisson.agent.rpc.http2.frames import Code
from caisson.agent.rpc.http2.hpack import encode
from caisson.agent.rpc.http2.messages import HttpRequest, HttpResponse
from tests.component.http2_peer import BLOCK, END, HEAD, LARGEST, TAIL, Frame, Never, connected, echo, frame, request


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
        # Settings also change the window of open streams: below zero, and back (6.9.2).
        await peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 5}))
        assert (await peer.frame()).flags == frames.ACK
        await peer.send(frames.number(frames.WINDOW_UPDATE, 1, 5))
        await peer.still_there()
        await peer.send(frames.settings({frames.INITIAL_WINDOW_SIZE: 100_000}))
        assert (await peer.frame()).flags == frames.ACK
        rest = b""
        while len(rest) < frames.DEFAULT_WINDOW - 17:  # what the connection's window permits
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
        await peer.send(piece)  # it was in flight: ignored
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
        peer.server.drain()
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
        # The sockets' capacity, and some more.
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
        assert peer.server.held <= (1 << 20) + 200_000  # a call that has begun may finish
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

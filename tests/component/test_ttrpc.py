"""Test the ttrpc server: calls, errors, deadlines, limits, and peers that violate the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import socket
from types import SimpleNamespace

import pytest

from caisson.agent.rpc import connection as connection_module
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc import frames, server
from caisson.agent.rpc.ttrpc.client import Client
from caisson.agent.rpc.ttrpc.responses import ConnectionClosed
from caisson.proto.kata1 import health_pb2
from caisson.proto.ttrpc import ttrpc_pb2
from tests.component.ttrpc_peers import Request, called, check, connected, failed, tcp_pair
from tests.support import fuzz
from tests.support.poll import until


async def test_calls_and_errors() -> None:
    async with called() as (client, health, _):
        assert (await health.Check(Request())).status == health_pb2.HealthCheckResponse.SERVING
        assert (await health.Version(Request(service="7"))).agent_version == "7"
        assert await failed(health.Check(Request(service="söme\ntext"))) == (StatusCode.UNKNOWN, "söme\ntext")
        for service, method in (("grpc.Health", "No"), ("no", "Check"), ("", "")):
            wanted = StatusCode.UNIMPLEMENTED, f"/{service}/{method}: unknown method"
            assert await failed(client.call(service, method, b"")) == wanted
        code, text = await failed(client.call("grpc.Health", "Check", b"\xff"))
        assert (code, text) == (StatusCode.INVALID_ARGUMENT, "Check: the request is not a valid CheckRequest")
        with pytest.raises(AttributeError, match="no method Chekc"):
            await health.Chekc(Request())


async def test_the_longest_messages() -> None:
    async with called() as (_, health, _):
        text = "x" * (frames.MAX_DATA - 64)
        assert (await health.Version(Request(service=text))).agent_version == text
        with pytest.raises(ValueError, match="ttrpc carries"):
            await health.Version(Request(service="x" * frames.MAX_DATA))
        code, text = await failed(health.Check(Request(service="large")))
        assert (code, "exceed maximum message size" in text) == (StatusCode.INVALID_ARGUMENT, True)
        await health.Check(Request())


async def test_a_thousand_calls_at_once_are_answered_in_any_order() -> None:
    async with called() as (_, health, pair):
        waiting = [asyncio.ensure_future(health.Check(Request(service="wait"))) for _ in range(1000)]
        await pair.health.until_waiting(1000)
        assert (await health.Version(Request(service="first"))).agent_version == "first"
        pair.health.go.set()
        assert len(await asyncio.gather(*waiting)) == 1000


async def test_a_deadline_holds_at_the_server() -> None:
    async with connected() as pair:
        await pair.send(check(1, "wait", 0.01), check(3, "wait"))
        assert await pair.error() == (1, StatusCode.DEADLINE_EXCEEDED, "Check: not done within 0.01 s")
        assert pair.health.waiting == 1
        await pair.send(frames.frame(5, frames.REQUEST, ttrpc_pb2.Request(timeout_nano=-1).SerializeToString()))
        assert (await pair.error())[:2] == (5, StatusCode.UNIMPLEMENTED)


async def test_a_deadline_holds_at_the_client_whatever_the_server_does() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with await Client.over(ours) as client:
            code, text = await failed(client.call("grpc.Health", "Check", b"", 0.01))
            assert (code, text) == (StatusCode.DEADLINE_EXCEEDED, "Check: no response within 0.01 s")
            assert not client._pending


async def test_the_end_of_a_connection_cancels_its_calls() -> None:
    async with connected() as pair:
        await pair.send(check(1, "wait"), check(3, "wait"))
        await pair.health.until_waiting(2)
        pair.sock.shutdown(socket.SHUT_WR)
        await pair.health.until_waiting(0)


async def test_calls_on_a_connection_that_ends_fail() -> None:
    async with called() as (_, health, pair):
        waiting = [asyncio.ensure_future(health.Check(Request(service="wait"))) for _ in range(3)]
        await pair.health.until_waiting(3)
        await pair.server.stop(grace=0.01)
        for call in (*waiting, health.Check(Request())):
            with pytest.raises(ConnectionClosed):
                await call


async def test_a_stop_waits_for_what_has_begun_and_refuses_the_rest() -> None:
    async with called() as (_, health, pair):
        call = asyncio.ensure_future(health.Check(Request(service="wait")))
        await pair.health.until_waiting(1)
        stop = asyncio.ensure_future(pair.server.stop(grace=20))
        assert await failed(health.Check(Request())) == (StatusCode.UNAVAILABLE, "the server is stopping")
        pair.health.go.set()
        assert await call
        await stop


async def test_a_stop_lets_clients_close_first() -> None:
    """Go's client drops a response if its connection is closed by the time it looks."""
    async with connected() as pair:
        await pair.still_serves()
        stop = asyncio.ensure_future(pair.server.stop(grace=20, linger=60))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pair.receive(), 0.05)
        pair.sock.close()
        await asyncio.wait_for(stop, 20)


async def test_a_client_that_does_not_close_is_not_waited_for() -> None:
    async with connected() as pair:
        await pair.still_serves()
        await asyncio.wait_for(pair.server.stop(grace=20, linger=0.01), 20)
        with pytest.raises(EOFError):
            await pair.receive()


BROKEN = [
    (frames.frame(2, frames.REQUEST, b""), 2, StatusCode.INVALID_ARGUMENT, "stream id must be odd"),
    (frames.frame(0, frames.REQUEST, b""), 0, StatusCode.INVALID_ARGUMENT, "stream id must be odd"),
    (frames.frame(1, frames.DATA, b"x"), 1, StatusCode.INVALID_ARGUMENT, "stream is no longer active"),
    (
        frames.frame(1, frames.REQUEST, b"", frames.REMOTE_OPEN),
        1,
        StatusCode.UNIMPLEMENTED,
        "streams are not supported, only unary calls",
    ),
    (
        frames.frame(1, frames.REQUEST, b"\xff"),
        1,
        StatusCode.INVALID_ARGUMENT,
        "the frame's data is not a valid ttrpc.Request",
    ),
    (
        frames.frame(1, frames.REQUEST, bytes(frames.MAX_DATA + 1)),
        1,
        StatusCode.INVALID_ARGUMENT,
        "message length 4194305 exceed maximum message size of 4194304",
    ),
]


@pytest.mark.parametrize(("sent", "stream_id", "code", "text"), BROKEN)
async def test_protocol_errors_are_answered_and_the_connection_goes_on(
    sent: bytes, stream_id: int, code: StatusCode, text: str
) -> None:
    async with connected() as pair:
        await pair.send(sent)
        assert await pair.error() == (stream_id, code, text)
        await pair.still_serves()


@pytest.mark.parametrize("kind", [frames.RESPONSE, 0, 4, 255])
async def test_frames_of_other_types_are_ignored(kind: int) -> None:
    async with connected() as pair:
        await pair.send(frames.frame(1, kind, b"anything", 0xFF))
        await pair.still_serves()


async def test_a_stream_id_in_use_is_refused_and_its_call_goes_on() -> None:
    async with connected() as pair:
        await pair.send(check(5, "wait"), check(5))
        assert await pair.error() == (5, StatusCode.INVALID_ARGUMENT, "stream id is in use")
        await pair.still_serves(3)  # a lower id than the last: multi-threaded clients send them out of order
        pair.health.go.set()
        assert (await pair.receive())[0] == 5


async def test_more_calls_than_there_may_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CALLS", 3)

    async with connected() as pair:
        await pair.send(*(check(stream_id, "wait") for stream_id in (1, 3, 5, 7)))
        assert await pair.error() == (7, StatusCode.RESOURCE_EXHAUSTED, "more than 3 calls at once")
        pair.health.go.set()
        assert {(await pair.receive())[0] for _ in range(3)} == {1, 3, 5}
        await pair.still_serves()


async def test_requests_under_way_hold_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_HELD", 1 << 20)

    async with connected() as pair:
        large = "wait" + "x" * (500 << 10)
        await pair.send(check(1, large), check(3, large), check(5, large))
        stream_id, code, _ = await pair.error()
        assert (stream_id, code) == (5, StatusCode.RESOURCE_EXHAUSTED)
        assert pair.connection.held <= 1 << 20
        pair.health.go.set()
        assert {(await pair.receive())[0] for _ in range(2)} == {1, 3}
        assert pair.connection.held == 0
        await pair.still_serves()


@pytest.mark.parametrize(
    ("count", "size", "most"), [(1000, 0, 1 << 23), (30, 4096, 1 << 25)], ids=["many frames", "few in a turn"]
)
async def test_server_stops_reading_from_a_peer_that_does_not_read(count: int, size: int, most: int) -> None:
    """The sockets' capacity, and some more."""
    async with connected() as pair:
        sent, block = 0, frames.frame(2, frames.REQUEST, bytes(size)) * count
        with pytest.raises(TimeoutError):
            while sent < 1 << 26:
                async with asyncio.timeout(1):
                    await pair.send(block)
                sent += len(block)
        assert sent < most


async def test_a_flood_of_frames_leaves_turns_to_other_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """One turn of the event loop handles a limited number of frames per connection."""
    monkeypatch.setattr(connection_module, "FRAMES_PER_TURN", 8)

    async with connected() as pair:
        loop, seen = asyncio.get_running_loop(), []
        await pair.send(*(check(stream_id, "wait") for stream_id in range(1, 201, 2)))

        def look() -> None:
            seen.append(len(pair.connection.calls) if pair.server._connections else 0)
            if seen[-1] < 100:
                loop.call_soon(look)

        loop.call_soon(look)
        await pair.health.until_waiting(100)
        assert max(after - before for before, after in itertools.pairwise(seen)) <= 8


async def test_a_long_request_that_comes_by_the_page_is_received_in_a_few_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A turn of the event loop takes longer than receiving a page."""
    received = pieces_received(monkeypatch)

    async with connected() as pair:
        page, request = 1 << 12, check(1, "x" * 600_000)
        for begin in range(0, len(request), page):
            await pair.send(request[begin : begin + page])
            await asyncio.sleep(0)  # the server's turn
        assert (await pair.error())[:2] == (1, StatusCode.UNKNOWN)
        assert sum(received) > 500_000
        assert len(received) < 60, received
        await pair.still_serves()


async def test_a_long_request_is_waited_for_by_the_kernel_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP has what vsock has in a guest: a socket is readable when so many bytes have come, and none has to sleep."""
    received = pieces_received(monkeypatch)
    monkeypatch.setattr(server, "low_water", server.LowWater)
    monkeypatch.setattr(server, "GATHER", 3600)
    monkeypatch.setattr(server, "MAX_WAIT", 3600)

    async with connected(tcp_pair) as pair:
        for stream_id in (1, 3):
            received.clear()
            page, request = 1 << 12, check(stream_id, "x" * 900_000)
            for begin in range(0, len(request), page):
                await pair.send(request[begin : begin + page])
                await asyncio.sleep(0)  # the server's turn
            assert (await pair.error())[:2] == (stream_id, StatusCode.UNKNOWN)
            assert sum(received) > 500_000
            assert len(received) < 10, received
            await pair.still_serves(stream_id + 100)


async def test_a_request_that_stops_short_is_taken_as_far_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that sends nothing until the agent has taken something must not wait for ever."""
    received = pieces_received(monkeypatch)
    monkeypatch.setattr(server, "low_water", server.LowWater)
    monkeypatch.setattr(server, "MAX_WAIT", 0.05)

    async with connected(tcp_pair) as pair:
        request = check(1, "x" * 600_000)
        half = len(request) // 2
        await pair.send(request[:half])
        await until(lambda: sum(received) == half - frames.HEADER_SIZE, "the first half is taken", 20)
        await pair.send(request[half : half + 1000])
        await until(lambda: sum(received) == half + 1000 - frames.HEADER_SIZE, "a little more is taken", 20)
        await pair.send(request[half + 1000 :])
        assert (await pair.error())[:2] == (1, StatusCode.UNKNOWN)


async def test_a_socket_that_cannot_wait_for_bytes_is_asked_once() -> None:
    ours, theirs = tcp_pair()
    theirs.close()
    ours.close()
    water = server.LowWater(ours)
    water.set(server.LOW_WATER)
    assert not water.usable
    water.close()


@pytest.mark.parametrize(
    ("release", "works"),
    [("6.12.118-caisson", True), ("6.8-rc1", True), ("7.0.0", True), ("6.1.0-40-cloud-amd64", False), ("odd", False)],
)
def test_only_kernels_that_grant_all_credit_wait_for_bytes(
    release: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.uname", lambda: SimpleNamespace(release=release))
    with socket.socket(socket.AF_VSOCK) as vsock, socket.socket(socket.AF_UNIX) as unix:
        assert (server.low_water(vsock) is not None) == works
        assert server.low_water(unix) is None


def pieces_received(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the size of each piece of a long frame."""
    received: list[int] = []
    note = frames.FrameReader.received

    def noted(reader: frames.FrameReader, count: int) -> None:
        received.append(count)
        note(reader, count)

    monkeypatch.setattr(frames.FrameReader, "received", noted)
    return received


@pytest.mark.fuzz
@pytest.mark.timeout(fuzz.LIMIT)
async def test_anything_at_all_is_survived() -> None:
    """Random frames, most of them invalid somewhere: the server responds, without an exception."""

    def some(chance: random.Random) -> bytes:
        data = chance.choice([b"", check(1)[frames.HEADER_SIZE :], chance.randbytes(40), b"\x0a\x0bgrpc.Health"])
        kind = chance.choice([frames.REQUEST, frames.REQUEST, frames.DATA, chance.randrange(256)])
        whole = frames.frame(chance.randrange(9), kind, data, chance.choice([0, 0, 1, 2, chance.randrange(256)]))
        return whole if chance.random() < 0.9 else whole[: chance.randrange(1, len(whole))]

    for one in fuzz.rounds(300):
        with one as chance:
            async with connected() as pair:
                await pair.send(check(99), *[some(chance) for _ in range(8)])
                pair.sock.shutdown(socket.SHUT_WR)
                with contextlib.suppress(EOFError, ConnectionError):
                    while True:
                        await pair.receive()

"""Test the ttrpc client, with a server that sends exactly what a test specifies."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc import frames
from caisson.agent.rpc.ttrpc.client import Client
from caisson.agent.rpc.ttrpc.responses import MAX_ERROR_TEXT, RpcError
from caisson.proto.ttrpc import ttrpc_pb2
from tests.component.ttrpc_peers import Request, called, failed


async def answered(respond: Callable[[int], bytes]) -> tuple[StatusCode, str] | bytes:
    """Return the result of a call, given the bytes the server sends on its stream."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with theirs:
        async with await Client.over(ours) as client:
            call = asyncio.ensure_future(client.call("s", "m", b""))
            request = await asyncio.get_running_loop().sock_recv(theirs, 1000)
            await asyncio.get_running_loop().sock_sendall(theirs, respond(int.from_bytes(request[4:8], "big")))
            try:
                return await asyncio.wait_for(call, 10)
            except RpcError as error:
                return error.code, error.text


def response(**fields: Any) -> Callable[[int], bytes]:
    data = ttrpc_pb2.Response(**fields).SerializeToString()
    return lambda stream_id: frames.frame(stream_id, frames.RESPONSE, data)


@pytest.mark.parametrize(
    ("respond", "outcome"),
    [
        (response(payload=b"x"), b"x"),
        (response(), b""),
        (response(status=ttrpc_pb2.Status(), payload=b"x"), b"x"),
        (response(status=ttrpc_pb2.Status(code=5, message="no")), (StatusCode.NOT_FOUND, "no")),
        (response(status=ttrpc_pb2.Status(code=77, message="new")), (StatusCode.UNKNOWN, "new")),
        (response(status=ttrpc_pb2.Status(code=-1)), (StatusCode.UNKNOWN, "")),
        (
            response(status=ttrpc_pb2.Status(code=2, message="x" * 100_000)),
            (StatusCode.UNKNOWN, "x" * MAX_ERROR_TEXT),
        ),
        (
            lambda stream_id: frames.frame(stream_id, frames.RESPONSE, b"\xff"),
            (StatusCode.INTERNAL, "the response is not a valid ttrpc.Response"),
        ),
        (
            lambda stream_id: (1 << 30).to_bytes(4, "big") + stream_id.to_bytes(4, "big") + b"\2\0",
            (StatusCode.RESOURCE_EXHAUSTED, frames.too_long(1 << 30)),
        ),
        (
            lambda stream_id: (
                frames.failure(stream_id + 2, StatusCode.UNKNOWN, "nobody's")
                + frames.frame(stream_id, frames.DATA, b"x")
                + frames.failure(stream_id, StatusCode.ABORTED, "mine")
                + frames.failure(stream_id, StatusCode.UNKNOWN, "again")
            ),
            (StatusCode.ABORTED, "mine"),
        ),
    ],
)
async def test_client_checks_responses(
    respond: Callable[[int], bytes], outcome: tuple[StatusCode, str] | bytes
) -> None:
    assert await answered(respond) == outcome


async def test_a_response_to_a_call_that_was_given_up_is_dropped() -> None:
    async with called() as (_, health, pair):
        call = asyncio.ensure_future(health.Check(Request(service="wait")))
        await pair.health.until_waiting(1)
        call.cancel()
        await asyncio.wait([call])
        pair.health.go.set()
        assert (await health.Version(Request(service="next"))).agent_version == "next"


async def test_a_client_waits_for_a_server_that_does_not_read() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with await Client.over(ours) as client:
            calls = [asyncio.ensure_future(client.call("s", "m", bytes(1 << 20))) for _ in range(20)]
            await asyncio.sleep(0.05)
            assert client._transport is not None
            assert client._transport.get_write_buffer_size() < 3 << 20
        for call in calls:
            assert await failed(call) == (StatusCode.UNAVAILABLE, "the connection is closed")


async def test_connecting_waits_while_the_listeners_queue_is_full(tmp_path: Path) -> None:
    loop, path = asyncio.get_running_loop(), str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(path)
        listener.listen(0)
        listener.setblocking(False)
        earlier = stack.enter_context(socket.socket(socket.AF_UNIX))
        earlier.connect(path)
        connecting = asyncio.ensure_future(Client.connect(path))
        await asyncio.sleep(0.05)
        assert not connecting.done()
        stack.enter_context((await loop.sock_accept(listener))[0])
        async with await asyncio.wait_for(connecting, 10) as client:
            accepted = stack.enter_context((await loop.sock_accept(listener))[0])
            call = asyncio.ensure_future(client.call("s", "m", b"payload"))
            assert b"payload" in await asyncio.wait_for(loop.sock_recv(accepted, 1000), 10)
            call.cancel()

"""gRPC, by gRPC's own client, by another one, and by requests that no client makes."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from caisson.agent.api.containers import read_response
from caisson.agent.api.health import Health as FirstHealth
from caisson.agent.base.boot_timestamps import BootTimestamps
from caisson.agent.base.errors import ModelError
from caisson.agent.base.log import Log
from caisson.agent.base.tracing import Tracing
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.dispatch import Dispatch, Service
from caisson.agent.rpc.http2 import grpc as codec
from caisson.agent.rpc.http2 import hpack
from caisson.agent.rpc.http2.messages import HttpRequest, HttpResponse
from caisson.agent.rpc.listener import accept, listen
from caisson.agent.rpc.server import Server
from caisson.proto.kata1 import agent_pb2, health_pb2

Code = grpc.StatusCode


class Health:
    """Methods to be called: what they do is said by the request's `service`."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        self.gone = asyncio.Event()
        self.go = asyncio.Event()

    async def Check(self, request: Any) -> Any:
        if request.service == "wait":
            self.waiting.set()
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.gone.set()
                raise
        elif request.service == "bug":
            raise ZeroDivisionError("of ours")
        elif request.service:
            raise ModelError(request.service)
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


SERVICE = Service(health_pb2.DESCRIPTOR.services_by_name["Health"], Health, unimplemented=("Version",))


def status_of(error: Exception) -> tuple[StatusCode, str] | None:
    return (StatusCode.UNKNOWN, str(error)) if isinstance(error, ModelError) else None


def dispatch(health: Health) -> Dispatch:
    return Dispatch(SERVICE.bind(health), Log("fatal"), Tracing(""), status_of)


class Served:
    """A server, its socket, and a client."""

    def __init__(self, server: Server, health: Health, path: Path, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.health = health
        self.path = path
        self.channel = channel

    def check(self, service: str, **options: Any) -> Any:
        call = self.channel.unary_unary("/grpc.Health/Check", health_pb2.CheckRequest.SerializeToString)
        return call(health_pb2.CheckRequest(service=service), **options)

    async def raw(self, message: bytes, path: str = "/grpc.Health/Check") -> bytes:
        return bytes(await self.channel.unary_unary(path)(message))


@contextlib.asynccontextmanager
async def served(directory: Path) -> AsyncIterator[Served]:
    log, health = Log("fatal"), Health()
    server = Server(log, grpc=dispatch(health))
    listener = listen(f"unix:{directory / 's'}")
    task = asyncio.ensure_future(accept(listener, server.accept, log))
    async with grpc.aio.insecure_channel(f"unix:{directory / 's'}") as channel:
        yield Served(server, health, directory / "s", channel)
    task.cancel()
    await asyncio.wait([task])
    await server.stop(grace=1)
    listener.close()


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString()


async def test_answers_and_errors(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        assert await one.raw(b"") == SERVING
        for text in ("plain", "100 %41 of \t it,\nand ö", "EOF"):
            assert await refused(one.check(text)) == (Code.UNKNOWN, text)
        assert await refused(one.check("bug")) == (Code.INTERNAL, "ZeroDivisionError: of ours")
        for path in ("/grpc.Health/Nothing", "/nothing"):
            assert await refused(one.raw(b"", path)) == (Code.UNIMPLEMENTED, f"{path}: unknown method")
        code, text = await refused(one.raw(b"", "/grpc.Health/Version"))
        assert (code, "not implemented" in text) == (Code.UNIMPLEMENTED, True)
        code, text = await refused(one.raw(b"\xff"))
        assert (code, "not a valid CheckRequest" in text) == (Code.INVALID_ARGUMENT, True)


async def test_the_largest_message_and_a_larger_one(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        unknown = b"\x7a"  # field 15, of bytes: passed over
        size = codec.MAX_MESSAGE - 5
        padded = unknown + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14 & 0x7F | 0x80, size >> 21])
        assert await one.raw(padded + bytes(size)) == SERVING
        code, text = await refused(one.raw(bytes(codec.MAX_MESSAGE + 1)))
        assert (code, str(codec.MAX_MESSAGE + 1) in text) == (Code.RESOURCE_EXHAUSTED, True)
        assert await one.raw(b"") == SERVING


async def test_many_calls_at_once(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        waiting = [one.check("wait") for _ in range(500)]
        assert await one.raw(b"") == SERVING
        one.health.go.set()
        assert await asyncio.gather(*waiting) == [SERVING] * 500


async def test_cancellation_and_deadline_end_the_handler(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        call = one.check("wait")
        await one.health.waiting.wait()
        call.cancel()
        await one.health.gone.wait()
        one.health.gone.clear()
        assert (await refused(one.check("wait", timeout=0.05)))[0] is Code.DEADLINE_EXCEEDED
        await one.health.gone.wait()


async def test_a_stop_waits_for_what_has_begun(tmp_path: Path) -> None:
    async with served(tmp_path) as one:
        call = asyncio.ensure_future(one.check("wait"))
        await one.health.waiting.wait()
        stop = asyncio.ensure_future(one.server.stop(grace=20))
        await asyncio.sleep(0)
        one.health.go.set()
        assert await call == SERVING
        await stop
        again = asyncio.ensure_future(one.check("wait"))
        one.health.go.clear()
        one.health.waiting.clear()
        await one.health.waiting.wait()
        await one.server.stop(grace=0.01)
        assert (await refused(again))[0] is Code.UNAVAILABLE


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", b"13"), (b"\0\0\0", b"13"), (b"\0\0\0\0\1", b"13"), (b"\0\0\0\0\0x", b"13"), (b"\1\0\0\0\0", b"12")],
    ids=["none", "cut", "short", "two", "compressed"],
)
async def test_messages_that_are_none(body: bytes, status: bytes) -> None:
    request = HttpRequest({b":method": b"POST", b":path": b"/grpc.Health/Check", b"content-type": b"application/grpc"})
    request.body += body
    assert dict(fields(await answer(request)))[b"grpc-status"] == status


@pytest.mark.parametrize("headers", [{b":method": b"GET"}, {b"content-type": b"text/html"}, {b"content-type": b""}])
async def test_requests_that_are_not_grpcs(headers: dict[bytes, bytes]) -> None:
    good = {b":method": b"POST", b":path": b"/grpc.Health/Check", b"content-type": b"application/grpc"}
    assert fields(await answer(HttpRequest(good | headers))) == [(b":status", b"415")]


async def answer(request: HttpRequest) -> HttpResponse:
    return await codec.serve(dispatch(Health()), request)


def fields(response: HttpResponse) -> list[tuple[bytes, bytes]]:
    return hpack.Decoder(1000).decode(response.header)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 1 << 20])
def test_an_answer_with_output_is_what_protobuf_would_write(size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert b"".join(read_response(data)) == agent_pb2.ReadStreamResponse(data=data).SerializeToString()


async def test_a_client_with_another_http2(tmp_path: Path) -> None:
    """curl's HTTP/2 is nghttp2's."""

    async with served(tmp_path) as one:
        command = [
            "curl", "--silent", "--show-error", "--include", "--http2-prior-knowledge",
            "--unix-socket", str(one.path), "--data-binary", "@-", "--header", "te: trailers",
            "--header", "content-type: application/grpc", "http://agent/grpc.Health/Check",
        ]  # fmt: skip
        program = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE)
        said, errors = await program.communicate(bytes(5))
        assert (program.returncode, errors) == (0, b"")
        head, body = said.split(b"\r\n\r\n", 1)
        assert head.splitlines()[0].split() == [b"HTTP/2", b"200"]
        assert body.startswith(b"\0\0\0\0\2" + SERVING)
        assert b"grpc-status: 0" in said


async def test_the_first_answer_is_waited_for_but_not_for_ever() -> None:
    health = FirstHealth(BootTimestamps())
    await health.answered(timeout=0.01)  # nobody asks
    waiting = asyncio.ensure_future(health.answered(timeout=60))
    await asyncio.sleep(0)
    early = waiting.done()
    await health.Check(health_pb2.CheckRequest())
    await waiting
    assert early is False

"""Test gRPC, with gRPC's own client, with another one, and with requests that no client sends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
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
from caisson.agent.rpc.ttrpc.client import Client
from caisson.proto.kata1 import agent_pb2, health_pb2
from tests.support.poll import until

Code = grpc.StatusCode


class Health:
    """Methods to call: the request's `service` says what they do."""

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
        unknown = b"\x7a"  # field 15, of bytes: skipped
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
    await health.wait_until_answered(timeout=0.01)  # nobody calls
    waiting = asyncio.ensure_future(health.wait_until_answered(timeout=60))
    await asyncio.sleep(0)
    early = waiting.done()
    await health.Check(health_pb2.CheckRequest())
    await waiting
    assert early is False


async def test_one_address_serves_both_protocols(tmp_path: Path) -> None:
    log, health = Log("fatal"), Health()
    server = Server(log, grpc=dispatch(health), ttrpc=dispatch(health))
    listener = listen(f"unix:{tmp_path / 's'}")
    task = asyncio.ensure_future(accept(listener, server.accept, log))
    async with (
        grpc.aio.insecure_channel(f"unix:{tmp_path / 's'}") as channel,
        await Client.connect(tmp_path / "s") as client,
    ):
        for _ in range(2):
            assert await channel.unary_unary("/grpc.Health/Check")(b"") == SERVING
            assert await client.call("grpc.Health", "Check", b"") == SERVING
    task.cancel()
    await asyncio.wait([task])
    await server.stop(grace=1)
    listener.close()


@pytest.mark.parametrize("protocols", [("grpc",), ("ttrpc",), ("grpc", "ttrpc")], ids="+".join)
@pytest.mark.parametrize("first", [b"\0", b"P", b"G", b"\x16\x03\x01"], ids=["ttrpc", "HTTP/2", "HTTP/1", "TLS"])
async def test_the_first_byte_decides_and_other_protocols_are_closed(first: bytes, protocols: tuple[str, ...]) -> None:
    lines: list[tuple[str, dict[str, object]]] = []

    class Lines(Log):
        def __call__(self, level: str, message: str, **fields: object) -> None:
            lines.append((message, fields))

    server = Server(Lines("fatal"), **{name: dispatch(Health()) for name in protocols})
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    loop = asyncio.get_running_loop()
    with ours:
        await loop.connect_accepted_socket(server.accept, theirs)
        await loop.sock_sendall(ours, first)
        spoken = {b"\0": "ttrpc", b"P": "grpc"}.get(first) in protocols
        if spoken:
            await until(lambda: server._connections, "the connection has its protocol")
            await server.stop(grace=0)
        assert await loop.sock_recv(ours, 1) == b""
    assert lines == ([] if spoken else [("closed a connection of an unknown protocol", {"first_byte": first[0]})])
    assert not server._connections


async def test_a_connection_on_which_nothing_came_is_closed_by_a_stop_and_forgotten_when_lost() -> None:
    server, loop = Server(Log("fatal"), grpc=dispatch(Health())), asyncio.get_running_loop()
    pairs = [socket.socketpair() for _ in range(2)]
    for ours, theirs in pairs:
        ours.setblocking(False)
        await loop.connect_accepted_socket(server.accept, theirs)
    pairs[0][0].close()
    await until(lambda: len(server._silent) == 1, "a lost connection is forgotten")
    await server.stop(grace=0)
    with pairs[1][0] as ours:
        assert await loop.sock_recv(ours, 1) == b""
    await until(lambda: not server._silent, "nothing is left")


async def test_a_deadline_of_grpc_holds_at_the_server() -> None:
    headers = {b":method": b"POST", b":path": b"/grpc.Health/Check", b"content-type": b"application/grpc"}
    for timeout, status in ((b"10m", b"4"), (b"10u", b"4"), (b"x", b"13"), (b"123456789S", b"13"), (b"S", b"13")):
        request = HttpRequest(headers | {b"grpc-timeout": timeout})
        request.body += b"\0\0\0\0\6" + health_pb2.CheckRequest(service="wait").SerializeToString()
        assert dict(fields(await answer(request)))[b"grpc-status"] == status


@pytest.mark.parametrize(
    ("request_bytes", "other"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", "ttrpc"),
        (b"\0\0\0\x14\0\0\0\1\1\0\x0a\x0bgrpc.Health\x12\5Check", "http2"),
    ],
    ids=["HTTP/2", "ttrpc"],
)
def test_the_first_answer_imports_neither_the_other_protocol_nor_the_model(request_bytes: bytes, other: str) -> None:
    code = f"""if True:
        import asyncio, socket, sys
        from caisson.agent.api.health import Health
        from caisson.agent.base.boot_timestamps import BootTimestamps
        from caisson.agent.base.log import Log
        from caisson.agent.base.tracing import Tracing
        from caisson.agent.rpc.dispatch import Dispatch, Service
        from caisson.agent.rpc.server import Server
        from caisson.proto.kata1 import health_pb2
        async def work():
            service = Service(health_pb2.DESCRIPTOR.services_by_name["Health"], Health)
            dispatch = Dispatch(service.bind(Health(BootTimestamps())), Log(), Tracing(""), lambda error: None)
            server = Server(Log(), grpc=dispatch, ttrpc=dispatch)
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(server.accept, theirs)
            await asyncio.get_running_loop().sock_sendall(ours, {request_bytes!r})
            assert await asyncio.get_running_loop().sock_recv(ours, 100)
        asyncio.run(work())
        unwanted = ("caisson.agent.rpc.{other}", "caisson.agent.model", "caisson.agent.libcontainer", "dataclasses",
                    "google.protobuf.any_pb2", "pathlib")
        print([name for name in sys.modules if name.startswith(unwanted)])
    """
    program = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"]
    assert subprocess.run(program, check=True, capture_output=True, text=True).stdout == "[]\n"


async def test_a_rehearsal_calls_the_method_and_leaves_no_connection(tmp_path: Path) -> None:
    called: list[Any] = []

    class WarmedUp(Health):
        async def Check(self, request: Any) -> Any:
            called.append(request)
            return await super().Check(request)

    log = Log("error")
    descriptor = health_pb2.DESCRIPTOR.services_by_name["Health"]
    methods = Service(descriptor, WarmedUp, unimplemented=["Version"]).bind(WarmedUp())
    dispatch = Dispatch(methods, log, Tracing(""), lambda error: None)
    server = Server(log, ttrpc=dispatch)
    await asyncio.wait_for(server.warm_up("grpc.Health", "Check"), 10)
    assert called == [health_pb2.CheckRequest()]
    await until(lambda: not server._connections)

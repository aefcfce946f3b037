"""gRPC's unary calls over HTTP/2: method tables from the descriptors, and one place where errors become statuses.

Not grpcio: its wheels cannot use vsock, so each byte took a way of its own through a Unix socket and this process, and
under emulation a call cost three times as much.  On the wire the two are the same.
Source: grpc/grpc, doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from google.protobuf import message_factory
from google.protobuf.message import DecodeError

from caisson.agent.base.errors import Invalid, Unsupported
from caisson.agent.base.log import Log
from caisson.agent.base.tracing import Tracing
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.http2 import hpack
from caisson.agent.rpc.http2.connection import Connection
from caisson.agent.rpc.http2.messages import Request, Response

#: Bytes of a request: gRPC's usual limit.
LARGEST_MESSAGE = 4 << 20

#: Bytes before a message: whether it is compressed, and its length.
PREFIX = 5

#: What is received at once.
BLOCK = 1 << 18

#: Services: descriptors, each with the objects of its methods.
Tables = list[tuple[Any, list[object]]]

Call = Callable[[bytes], Awaitable[Response]]

_CONTENT_TYPE = b"application/grpc"
_HEADERS = ((b":status", b"200"), (b"content-type", _CONTENT_TYPE))
_HEAD = hpack.encode(*_HEADERS)
_OK = hpack.encode((b"grpc-status", b"0"))


class Server:
    """Answers on any number of connections."""

    def __init__(
        self, services: Tables, log: Log, tracing: Tracing, others: Callable[[], Tables] | None = None
    ) -> None:
        """``others`` makes more services, when a method is called that the first ones do not have."""
        self._log = log
        self._tracing = tracing
        self._others = others
        self._calls: dict[bytes, Call] = {}
        self._add(services)
        self._buffer = memoryview(bytearray(BLOCK))
        self._connections: set[Connection] = set()

    def _add(self, services: Tables) -> None:
        for descriptor, implementations in services:
            for method in descriptor.methods:
                path = f"/{descriptor.full_name}/{method.name}".encode()
                self._calls[path] = _call(method, implementations, self._log, self._tracing)

    def _call_of(self, path: bytes) -> Call | None:
        if path not in self._calls and self._others is not None:
            self._add(self._others())
            self._others = None
        return self._calls.get(path)

    def connection(self) -> Connection:
        """The protocol of one more connection."""
        connection = Connection(
            self._answer, PREFIX + LARGEST_MESSAGE, self._buffer, self._log, self._connections.discard
        )
        self._connections.add(connection)
        return connection

    async def stop(self, grace: float) -> None:
        """Take no more requests; those under way get so many seconds."""
        under_way: list[asyncio.Task[None]] = []
        for connection in self._connections:
            connection.leave()
            under_way += connection.answering
        if under_way:
            await asyncio.wait(under_way, timeout=grace)
        for connection in list(self._connections):
            connection.close()

    async def _answer(self, request: Request) -> Response:
        headers = request.headers
        if headers[b":method"] != b"POST" or not headers.get(b"content-type", b"").startswith(_CONTENT_TYPE):
            return Response(hpack.encode((b":status", b"415")))
        call = self._call_of(headers[b":path"])
        if call is None:
            return _failure(StatusCode.UNIMPLEMENTED, "Method not found!")
        length = int.from_bytes(request.body[1:PREFIX], "big")
        if length > LARGEST_MESSAGE:
            text = f"Received message larger than max ({length} vs. {LARGEST_MESSAGE})"
            return _failure(StatusCode.RESOURCE_EXHAUSTED, text)
        if len(request.body) != PREFIX + length:
            return _failure(StatusCode.INTERNAL, "the request is not one whole message")
        if request.body[0]:
            return _failure(StatusCode.UNIMPLEMENTED, "the request is compressed")
        return await call(bytes(memoryview(request.body)[PREFIX:]))


def _success(message: list[bytes]) -> Response:
    length = sum(map(len, message))
    return Response(_HEAD, [b"\0" + length.to_bytes(PREFIX - 1, "big"), *message], _OK)


def _failure(code: StatusCode, text: str) -> Response:
    """An answer of trailers alone.  The text is percent-encoded as the protocol wants it."""
    message = "".join(chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}" for byte in text.encode())
    trailers = (b"grpc-status", b"%d" % code), (b"grpc-message", message.encode())
    return Response(hpack.encode(*_HEADERS, *trailers))


def _call(method: Any, implementations: list[object], log: Log, tracing: Tracing) -> Call:
    name = method.name

    async def missing(request: Any) -> NoReturn:
        raise Unsupported(f"{name} is not implemented by this agent yet")

    function = next((getattr(one, name) for one in implementations if hasattr(one, name)), missing)
    request_class = message_factory.GetMessageClass(method.input_type)

    async def call(data: bytes) -> Response:
        began = time.monotonic()
        code, text = StatusCode.OK, ""
        request = request_class()
        try:
            try:
                request.ParseFromString(data)
            except DecodeError:
                raise Invalid(f"{name}: the request is no {method.input_type.name}") from None
            answer = await function(request)
            return _success(answer if isinstance(answer, list) else [answer.SerializeToString()])
        except asyncio.CancelledError:
            code, text = StatusCode.CANCELLED, "the caller has gone"
            raise
        except Exception as error:
            from caisson.agent.api.status import status_of

            status = status_of(error)
            if status is None:
                text = " ".join(f"{type(error).__name__}: {error}".split())
                status = StatusCode.INTERNAL, text
                log("error", "a bug in a handler", method=name, error=_traceback(error))
            code, text = status
        finally:
            if tracing.enabled or log.enabled("debug"):
                ids = {key: getattr(request, key) for key in ("container_id", "exec_id") if hasattr(request, key)}
                seconds = time.monotonic() - began
                log("debug", "request", method=name, status=code.name, error=text, seconds=round(seconds, 6), **ids)
                now = time.time_ns()
                tracing.request(name, now - int(seconds * 1e9), now, code.name, ids)
        return _failure(code, text)

    return call


def _traceback(error: Exception) -> str:
    import traceback

    return "".join(traceback.format_exception(error))

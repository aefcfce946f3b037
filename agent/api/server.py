"""The gRPC server: method tables from the descriptors, and one place where errors become statuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf import message_factory
from google.protobuf.message import DecodeError

from agent.api.status import status_of
from agent.errors import Invalid, Unsupported
from agent.log import Log
from agent.tracing import Tracing

Method = Callable[[Any], Awaitable[Any]]

OPTIONS = [("grpc.so_reuseport", 0), ("grpc.max_concurrent_streams", 4096)]


def serve(services: list[tuple[Any, list[object]]], path: str, log: Log, tracing: Tracing) -> grpc.aio.Server:
    """A server (not started) on a Unix socket for services, each a descriptor with the objects of its methods."""
    server = grpc.aio.server(options=OPTIONS)
    for descriptor, implementations in services:
        handlers = {method.name: _handler(method, implementations, log, tracing) for method in descriptor.methods}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(descriptor.full_name, handlers),))
    server.add_insecure_port(f"unix:{path}")
    return server


def _handler(method: Any, implementations: list[object], log: Log, tracing: Tracing) -> grpc.RpcMethodHandler:
    name = method.name

    async def missing(request: Any) -> NoReturn:
        raise Unsupported(f"{name} is not implemented by this agent yet")

    function: Method = next((getattr(one, name) for one in implementations if hasattr(one, name)), missing)
    request_class = message_factory.GetMessageClass(method.input_type)

    async def handle(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        began = time.monotonic()
        code, text = grpc.StatusCode.OK, ""
        request = request_class()
        try:
            try:
                request.ParseFromString(data)  # here, not in grpc, which would answer with a Python exception's text
            except DecodeError:
                raise Invalid(f"{name}: the request is no {method.input_type.name}") from None
            return await function(request)
        except asyncio.CancelledError:
            code, text = grpc.StatusCode.CANCELLED, "the caller has gone"
            raise
        except Exception as error:
            status = status_of(error)
            if status is None:
                text = " ".join(f"{type(error).__name__}: {error}".split())
                status = grpc.StatusCode.INTERNAL, text
                log("error", "a bug in a handler", method=name, error=_traceback(error))
            code, text = status
        finally:
            if tracing.enabled or log.enabled("debug"):
                ids = {key: getattr(request, key) for key in ("container_id", "exec_id") if hasattr(request, key)}
                seconds = time.monotonic() - began
                log("debug", "request", method=name, status=code.name, error=text, seconds=round(seconds, 6), **ids)
                now = time.time_ns()
                tracing.request(name, now - int(seconds * 1e9), now, code.name, ids)
        await context.abort(code, text)

    return grpc.unary_unary_rpc_method_handler(
        handle,
        response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
    )


def _traceback(error: Exception) -> str:
    import traceback

    return "".join(traceback.format_exception(error))

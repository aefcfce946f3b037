"""Serve calls that do nothing, with grpc.aio: the peer of an agent's calls and memory.

    python -m tests.bench.bare PATH

It listens on a Unix socket.  `Nothing` returns an empty response, `Bytes` as many bytes as requested.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc

SERVICE = "bench.Bare"


async def _nothing(data: bytes, context: Any) -> bytes:
    return b""


async def _bytes(data: bytes, context: Any) -> bytes:
    return bytes(int(data))


async def serve(path: str) -> None:
    """Serve until killed; print `ready` on stdout."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handlers = {"Nothing": _nothing, "Bytes": _bytes}
    methods = {name: grpc.unary_unary_rpc_method_handler(handler) for name, handler in handlers.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))

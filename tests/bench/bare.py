"""A grpc.aio server that does nothing: what an agent's calls, and its memory, are measured against.

    python -m tests.bench.bare unix:PATH PRIVATE [relayed]

`Nothing` answers with nothing, `Bytes` with as many bytes as the request says.  With `relayed` it listens as the agent
does, through agent.listener's relay to the Unix socket PRIVATE; without, gRPC listens on PATH itself.
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


async def serve(address: str, private: str, relayed: bool) -> None:
    """Serve until killed; says `ready` on stdout."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handlers = {"Nothing": _nothing, "Bytes": _bytes}
    methods = {name: grpc.unary_unary_rpc_method_handler(handler) for name, handler in handlers.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    server.add_insecure_port(f"unix:{private}" if relayed else address)
    await server.start()
    print("ready", flush=True)
    if relayed:
        from agent.listener import Relay, listen

        await Relay(listen(address), private, lambda *_, **__: None).run()  # type: ignore[arg-type]
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2], "relayed" in sys.argv[3:]))

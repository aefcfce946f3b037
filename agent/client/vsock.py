"""Ports of a guest, by the socket that a VM has for them: CONNECT <port>, and OK <port> when somebody listens there.

The handshake is that of Firecracker and Cloud Hypervisor.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from caisson.agent.client.errors import Mistake

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

LAST_PORT = (1 << 32) - 2  # the last one means "any" (vsock(7))

#: Seconds for a guest to accept.
PATIENCE = 30.0


async def dial(socket: Path, port: int) -> Streams:
    """Connect to a port of the guest.  Raises Mistake when nobody listens there, or there is no VM."""
    if not 0 <= port <= LAST_PORT:
        raise Mistake(f"vsock ports are 0 to {LAST_PORT}, not {port}")
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket))
    except OSError as error:
        raise Mistake(f"{socket}: {error.strerror or error}; the VM has ended") from error
    try:
        writer.write(f"CONNECT {port}\n".encode())
        async with asyncio.timeout(PATIENCE):
            answer = await reader.readline()
    except (OSError, TimeoutError):
        answer = b""
    except BaseException:
        writer.close()
        raise
    if not answer.startswith(b"OK "):
        writer.close()
        raise Mistake(f"nobody listens on vsock port {port} of the guest")
    return reader, writer

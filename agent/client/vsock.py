"""Connect to vsock ports of a guest through the VM's Unix socket.

The hybrid handshake of Firecracker and Cloud Hypervisor: CONNECT <port>, answered by OK <port>.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from caisson.agent.client.errors import UsageError

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

MAX_PORT = (1 << 32) - 2  # the last one means "any" (vsock(7))

#: Seconds for a guest to accept.
CONNECT_TIMEOUT = 30.0


async def dial(socket: Path, port: int) -> Streams:
    """Connect to a vsock port of the guest.  Raises UsageError when nothing listens, or the VM has ended."""
    if not 0 <= port <= MAX_PORT:
        raise UsageError(f"vsock port {port}: out of range; ports are 0 to {MAX_PORT}")
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket))
    except OSError as error:
        raise UsageError(f"{socket}: {error.strerror or error}; the VM has ended") from error
    try:
        writer.write(f"CONNECT {port}\n".encode())
        async with asyncio.timeout(CONNECT_TIMEOUT):
            answer = await reader.readline()
    except (OSError, TimeoutError):
        answer = b""
    except BaseException:
        writer.close()
        raise
    if not answer.startswith(b"OK "):
        writer.close()
        raise UsageError(f"vsock port {port}: nothing listens there in the guest")
    return reader, writer

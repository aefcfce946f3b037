"""Forward TCP ports of the host to ports of a guest, and back.

The host cannot reach a guest's network, so a TCP port is reached from inside: through `nc` in a container, which shares
the guest's network namespace.  vsock ports are reached through the hybrid handshake of Firecracker and Cloud Hypervisor
on the VM's socket: CONNECT <port>, answered by OK <port>.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from caisson.agent.base.aio import connect_unix, join
from caisson.agent.client.caller import CHUNK, PATH
from caisson.agent.client.connection import Container
from caisson.agent.client.errors import AgentError, UsageError

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

MAX_PORT = (1 << 32) - 2  # the last one means "any" (vsock(7))

#: Seconds for a guest to accept.
CONNECT_TIMEOUT = 30.0

RULE = re.compile(
    r"(?:(?P<address>[0-9.]+|localhost|\[[0-9a-fA-F:]+\]):)?(?P<host>[0-9]+):(?:(?P<kind>tcp|vsock):)?(?P<guest>[0-9]+)"
)
MAX_TCP_PORT = 65535

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True)
class ForwardRule:
    """A TCP port of the host (0: any free one) and a port of the guest (``kind`` tcp or vsock)."""

    address: str
    host: int
    kind: str
    guest: int

    @classmethod
    def parse(cls, text: str) -> ForwardRule:
        """Parse [ADDRESS:]PORT:[vsock:|tcp:]PORT, the host's first.  Raises UsageError."""
        found = RULE.fullmatch(text)
        if not found:
            raise UsageError(f"{text!r}: is not a pair of ports; give [ADDRESS:]PORT:PORT or [ADDRESS:]PORT:vsock:PORT")
        address = (found["address"] or "127.0.0.1").strip("[]").replace("localhost", "127.0.0.1")
        rule = cls(address, int(found["host"]), found["kind"] or "tcp", int(found["guest"]))
        if rule.host > MAX_TCP_PORT or rule.guest > (MAX_TCP_PORT if rule.kind == "tcp" else MAX_PORT):
            raise UsageError(f"{text!r}: port out of range; TCP ports end at {MAX_TCP_PORT}")
        return rule


async def dial(socket: Path, port: int) -> Streams:
    """Connect to a vsock port of the guest.  Raises UsageError if nothing listens, or the VM has exited."""
    if not 0 <= port <= MAX_PORT:
        raise UsageError(f"vsock port {port}: out of range; ports are 0 to {MAX_PORT}")
    try:
        reader, writer = await asyncio.open_unix_connection(sock=await connect_unix(socket))
    except OSError as error:
        raise UsageError(f"{socket}: {error.strerror or error}; the VM has ended") from error
    try:
        writer.write(f"CONNECT {port}\n".encode())
        async with asyncio.timeout(CONNECT_TIMEOUT):
            answer = await reader.readline()
    except (OSError, ValueError):  # ValueError: a line without end
        answer = b""
    except BaseException:
        writer.close()
        raise
    if not answer.startswith(b"OK "):
        writer.close()
        raise UsageError(f"vsock port {port}: nothing listens there in the guest")
    return reader, writer


def to_vsock(socket: Path, port: int) -> Serve:
    """Relay a connection to a vsock port of the guest."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await join((reader, writer), await dial(socket, port))

    return serve


def to_tcp(address: str, port: int) -> Serve:
    """Relay a connection to a TCP port that the host can reach."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await join((reader, writer), await asyncio.open_connection(address, port))

    return serve


def to_container(container: Container, port: int) -> Serve:
    """Relay a connection to a TCP port of the guest, through `nc` in a container."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        process = await container.exec(["nc", "127.0.0.1", str(port)], env=[PATH])

        async def inward() -> None:
            with contextlib.suppress(AgentError):  # it has exited: so has its output
                while data := await reader.read(CHUNK):
                    await process.write(data)
                await process.close_stdin()

        async def outward() -> int:
            size = 0
            async for data in process.stdout():
                writer.write(data)
                await writer.drain()
                size += len(data)
            return size

        feeder = asyncio.create_task(inward())
        try:
            if not await outward() and await process.wait():  # nc has said why, and this is the only likely reason
                raise UsageError(f"tcp port {port}: nothing listens there in the guest")
        finally:
            feeder.cancel()
            with contextlib.suppress(AgentError):
                await process.signal(9)  # the peer has disconnected

    return serve


@contextlib.asynccontextmanager
async def listening(where: ForwardRule | Path, serve: Serve, report: Callable[[str], None]) -> AsyncIterator[int]:
    """Listen on a TCP port of the host or a Unix socket while the block runs, and yield the port.

    A connection that fails is closed and reported.  Raises UsageError when listening fails.
    """

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (UsageError, AgentError) as error:
            report(str(error))
        except OSError as error:
            report(error.strerror or str(error))
        finally:
            writer.close()

    try:
        if isinstance(where, ForwardRule):
            server = await asyncio.start_server(handle, where.address, where.host)
        else:
            server = await asyncio.start_unix_server(handle, where)
    except OSError as error:
        raise UsageError(f"cannot listen: {error.strerror or error}") from error
    try:
        name = server.sockets[0].getsockname()
        yield name[1] if isinstance(where, ForwardRule) else 0
    finally:
        server.close()
        if isinstance(where, Path):
            where.unlink(missing_ok=True)


async def wait_readable(exit_fd: int | None) -> None:
    """Wait until a descriptor becomes readable; None counts as readable."""
    if exit_fd is None:
        return
    happened = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(exit_fd, happened.set)
    try:
        await happened.wait()
    finally:
        loop.remove_reader(exit_fd)

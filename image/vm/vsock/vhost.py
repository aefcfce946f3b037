"""The kernel's vsock (vhost-vsock): a CID of one's own, and Unix sockets that lead to the guest's ports.

    python -m image.vm.vsock.vhost --cid CID --socket S --raw PATH=PORT --ready-fd N

The kernel moves the bytes between guest and host; this relay gives a VM on it the same sockets as one on our own
device.  Sources: vsock(7); include/uapi/linux/vhost.h (VHOST_VSOCK_SET_GUEST_CID).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import fcntl
import os
import random
import signal
import socket
import struct
from collections.abc import Awaitable, Callable

from image.vm.accel import VHOST_VSOCK
from image.vm.errors import VMError

VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60

#: CIDs 0-2 have a meaning of their own, and the last stands for any.
FIRST_CID, LAST_CID = 3, 0xFFFFFFFE

#: Seconds, and bytes, for a client to say which port it wants.
PATIENCE, LONGEST_LINE = 10.0, 32
BLOCK = 1 << 18


def allocate() -> tuple[int, int]:
    """An open /dev/vhost-vsock that owns a free CID, and that CID.

    The kernel refuses a CID that is in use, so two VMs started at once cannot get the same one.  Raises VMError.
    """
    try:
        device = os.open(VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise VMError(f"{VHOST_VSOCK} cannot be opened: {os.strerror(error.errno or 0)}") from error
    for _ in range(1000):
        cid = random.randint(FIRST_CID, 0x7FFFFFFF)
        try:
            fcntl.ioctl(device, VHOST_VSOCK_SET_GUEST_CID, struct.pack("Q", cid))
            return device, cid
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                os.close(device)
                raise VMError(f"{VHOST_VSOCK} refuses a guest CID: {os.strerror(error.errno or 0)}") from error
    os.close(device)
    raise VMError("no free guest CID was found")


async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Copy until the end of file, and pass that on."""
    with contextlib.suppress(ConnectionError):
        while data := await source.read(BLOCK):
            target.write(data)
            await target.drain()
        if target.can_write_eof():
            target.write_eof()


async def join(cid: int, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hello: bytes) -> None:
    """Connect to a port of the guest and relay both ways until both have ended."""
    guest = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    guest.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(guest, (cid, port))
    except OSError:
        guest.close()
        return
    there_reader, there_writer = await asyncio.open_connection(sock=guest)
    try:
        if hello:
            writer.write(hello)
        await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))
    finally:
        there_writer.close()


def closing(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """A connection handler that closes its connection whatever happens."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, TimeoutError, ValueError, asyncio.LimitOverrunError):
                await serve(reader, writer)
        finally:
            writer.close()

    return handler


async def relay(cid: int, hybrid: str, raw: dict[str, int], ready_fd: int) -> None:
    """Serve until SIGTERM."""

    async def by_handshake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(PATIENCE):
            line = await reader.readuntil(b"\n")
        word, _, number = line.decode("ascii", "replace").strip().partition(" ")
        if word == "CONNECT" and len(line) <= LONGEST_LINE:
            await join(cid, int(number), reader, writer, f"OK {number}\n".encode())

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    os.umask(0o177)
    servers = [await asyncio.start_unix_server(closing(by_handshake), hybrid)]
    for path, port in raw.items():

        async def straight(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int = port) -> None:
            await join(cid, port, reader, writer, b"")

        servers.append(await asyncio.start_unix_server(closing(straight), path))
    os.write(ready_fd, b"\n")
    os.close(ready_fd)
    await stop.wait()
    for server in servers:
        server.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="image.vm.vsock.vhost")
    parser.add_argument("--cid", type=int, required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--raw", action="append", default=[], metavar="PATH=PORT")
    parser.add_argument("--ready-fd", type=int, required=True)
    options = parser.parse_args()
    raw = {path: int(port) for path, _, port in (entry.rpartition("=") for entry in options.raw)}
    asyncio.run(relay(options.cid, options.socket, raw, options.ready_fd))


if __name__ == "__main__":
    main()

"""Unix sockets that lead to a guest's vsock ports, for VMs on the kernel's vhost-vsock.

    python -I -S relay.py --cid CID --socket S --raw PATH=PORT --ready-fd N

The kernel moves the bytes between guest and host; this gives a VM the same sockets as our own device does: ``S`` takes
``CONNECT <port>``, answered with ``OK <port>``, and each PATH leads to its port right away.  Ends on SIGTERM.
Standard library alone, imported from nowhere.  Source: vsock(7).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import select
import signal
import socket
from collections.abc import Awaitable, Callable

#: Seconds for a client to say which port it wants.
PATIENCE = 10.0

#: `CONNECT 4294967295\r\n`
LONGEST_LINE = 20

#: What connect(2) says while the guest's driver is not up yet: then a client waits, as it does with our own device.
NOT_YET = (errno.ETIMEDOUT, errno.ENODEV, errno.EHOSTUNREACH, errno.ENETUNREACH)
AGAIN = 0.2

BLOCK = 1 << 18

Dial = Callable[[int], Awaitable[socket.socket]]


class HandshakeError(Exception):
    """A client on the hybrid socket did not say what it should."""


def dialler(cid: int) -> Dial:
    """Connects to ports of a guest; raises OSError when that fails."""

    async def dial(port: int) -> socket.socket:
        with contextlib.ExitStack() as stack:
            guest = stack.enter_context(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
            guest.setblocking(False)
            await asyncio.get_running_loop().sock_connect(guest, (cid, port))
            stack.pop_all()
            return guest

    return dial


def hung_up(client: socket.socket) -> bool:
    """Whether a client has closed its end altogether."""
    poll = select.poll()
    poll.register(client, 0)
    return bool(poll.poll(0))


async def patiently(dial: Dial, port: int, client: socket.socket) -> socket.socket:
    """Dial until the guest's driver is up, or the client has gone.  Raises OSError, too, when nobody listens there."""
    while True:
        try:
            return await dial(port)
        except OSError as error:
            if error.errno not in NOT_YET or hung_up(client):
                raise
        await asyncio.sleep(AGAIN)


async def wanted_port(client: socket.socket) -> int:
    """The port of the ``CONNECT <port>`` line, and no byte beyond it.  Raises HandshakeError."""
    loop = asyncio.get_running_loop()
    line = b""
    while not line.endswith(b"\n"):
        byte = await loop.sock_recv(client, 1)
        line += byte
        if not byte or len(line) > LONGEST_LINE:
            raise HandshakeError
    word, _, number = line.strip().partition(b" ")
    if word != b"CONNECT" or not number.isdigit() or int(number) >= 0xFFFFFFFF:
        raise HandshakeError
    return int(number)


async def pump(source: socket.socket, target: socket.socket) -> None:
    """Copy until the end of file, and pass that on.  Raises OSError when either side breaks."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, BLOCK):
        await loop.sock_sendall(target, data)
    target.shutdown(socket.SHUT_WR)


async def serve(client: socket.socket, port: int | None, dial: Dial) -> None:
    """One connection, to its end: both directions have ended, or either side broke.  ``port`` None: it says which."""
    loop = asyncio.get_running_loop()
    with client, contextlib.ExitStack() as stack:
        try:
            hello = b""
            if port is None:
                async with asyncio.timeout(PATIENCE):
                    port = await wanted_port(client)
                hello = f"OK {port}\n".encode()
            guest = stack.enter_context(await patiently(dial, port, client))
            await loop.sock_sendall(client, hello)
            async with asyncio.TaskGroup() as group:  # one that breaks ends the other
                group.create_task(pump(client, guest))
                group.create_task(pump(guest, client))
        except* (OSError, HandshakeError):
            pass


async def listen(path: str, port: int | None, dial: Dial) -> None:
    """Serve what connects to a Unix socket of this path, until cancelled; the socket is there when this first waits."""
    loop = asyncio.get_running_loop()
    clients: set[asyncio.Task[None]] = set()
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.umask(0o177)
        listener.bind(path)
        os.umask(before)
        listener.listen(128)
        listener.setblocking(False)
        try:
            while True:
                try:
                    client, _ = await loop.sock_accept(listener)
                except OSError:  # no descriptor to spare: it waits in the listener's queue
                    await asyncio.sleep(AGAIN)
                    continue
                client.setblocking(False)
                task = loop.create_task(serve(client, port, dial))
                clients.add(task)
                task.add_done_callback(clients.discard)
        finally:
            os.unlink(path)  # noqa: PTH108 - pathlib costs as much to import as all the rest


async def relay(hybrid: str, raw: dict[str, int], dial: Dial, ready: Callable[[], None]) -> None:
    """Serve all sockets until cancelled; ``ready`` is called when they take connections."""
    async with asyncio.TaskGroup() as group:
        group.create_task(listen(hybrid, None, dial))
        for path, port in raw.items():
            group.create_task(listen(path, port, dial))
        await asyncio.sleep(0)  # each has run up to its first wait
        ready()


async def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="relay", description="Unix sockets that lead to a guest's vsock ports.")
    parser.add_argument("--cid", type=int, required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--raw", action="append", default=[], metavar="PATH=PORT")
    parser.add_argument("--ready-fd", type=int)
    options = parser.parse_args()
    raw = {path: int(port) for path, _, port in (entry.rpartition("=") for entry in options.raw)}

    def ready() -> None:
        if options.ready_fd is not None:
            os.write(options.ready_fd, b"\n")
            os.close(options.ready_fd)

    task = asyncio.ensure_future(relay(options.socket, raw, dialler(options.cid), ready))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    asyncio.run(main())

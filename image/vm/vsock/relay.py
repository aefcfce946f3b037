"""Unix sockets for a guest's vsock ports, for VMs on the kernel's vhost-vsock.

    python -I -S relay.py --cid CID --socket S --raw PATH=PORT --ready-fd N

The kernel moves the bytes between guest and host; this program gives a VM the same sockets as our own device does:
``S`` takes ``CONNECT <port>``, answered with ``OK <port>``, each PATH leads to its port without a handshake, and the
guest's connections to a port of the host arrive at ``S_<port>``.  All VMs share the ports of the host, so each port is
one VM's at a time.  Exits on SIGTERM.  Needs only the standard library, and nothing imports it.  Source: vsock(7).
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

#: Seconds for a client to send its CONNECT line.
CONNECT_TIMEOUT = 10.0

#: `CONNECT 4294967295\r\n`
MAX_LINE = 20

#: Errors of connect(2) while the guest's driver is not up yet: the client then waits, as with our own device.
DRIVER_NOT_READY = (errno.ETIMEDOUT, errno.ENODEV, errno.EHOSTUNREACH, errno.ENETUNREACH)
RETRY_INTERVAL = 0.2

#: Seconds between scans for sockets to which the guest may connect.
SCAN_INTERVAL = 0.5

BLOCK = 1 << 18

Dial = Callable[[int], Awaitable[socket.socket]]


class HandshakeError(Exception):
    """A client on the hybrid socket did not send a valid CONNECT line."""


def dialler(cid: int) -> Dial:
    """Return a function that connects to ports of a guest, and raises OSError."""

    async def dial(port: int) -> socket.socket:
        with contextlib.ExitStack() as stack:
            guest = stack.enter_context(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
            guest.setblocking(False)
            await asyncio.get_running_loop().sock_connect(guest, (cid, port))
            stack.pop_all()
            return guest

    return dial


def is_closed(client: socket.socket) -> bool:
    """Return whether a client has closed its socket."""
    poll = select.poll()
    poll.register(client, 0)
    return bool(poll.poll(0))


async def dial_when_ready(dial: Dial, port: int, client: socket.socket) -> socket.socket:
    """Dial until the guest's driver is up, or the client disconnects.  Raises OSError, also if nothing listens
    there.
    """
    while True:
        try:
            return await dial(port)
        except OSError as error:
            if error.errno not in DRIVER_NOT_READY or is_closed(client):
                raise
        await asyncio.sleep(RETRY_INTERVAL)


async def wanted_port(client: socket.socket) -> int:
    """Read the ``CONNECT <port>`` line, and nothing beyond it; returns the port.  Raises HandshakeError."""
    loop = asyncio.get_running_loop()
    line = b""
    while not line.endswith(b"\n"):
        byte = await loop.sock_recv(client, 1)
        line += byte
        if not byte or len(line) > MAX_LINE:
            raise HandshakeError
    word, _, number = line.strip().partition(b" ")
    if word.upper() != b"CONNECT" or not number.isdigit() or int(number) >= 0xFFFFFFFF:
        raise HandshakeError
    return int(number)


async def pump(source: socket.socket, target: socket.socket) -> None:
    """Copy until end of file, and pass that on.  Raises OSError if either side fails."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, BLOCK):
        await loop.sock_sendall(target, data)
    target.shutdown(socket.SHUT_WR)


async def serve(client: socket.socket, port: int | None, dial: Dial) -> None:
    """Serve one connection until both directions have ended, or either side fails.  ``port`` None: it sends CONNECT."""
    loop = asyncio.get_running_loop()
    with client, contextlib.ExitStack() as stack:
        try:
            hello = b""
            if port is None:
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    port = await wanted_port(client)
                hello = f"OK {port}\n".encode()
            guest = stack.enter_context(await dial_when_ready(dial, port, client))
            await loop.sock_sendall(client, hello)
            await join(client, guest)
        except* (OSError, HandshakeError):
            pass


async def join(one: socket.socket, other: socket.socket) -> None:
    """Pump both ways until both have ended.  Raises a group of OSErrors if either fails, which ends the other."""
    async with asyncio.TaskGroup() as group:
        group.create_task(pump(one, other))
        group.create_task(pump(other, one))


async def accept(listener: socket.socket, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
    """Serve connections until cancelled."""
    loop = asyncio.get_running_loop()
    clients: set[asyncio.Future[None]] = set()
    listener.listen(128)
    listener.setblocking(False)
    while True:
        try:
            client, _ = await loop.sock_accept(listener)
        except OSError:  # out of descriptors: it waits in the listener's queue
            await asyncio.sleep(RETRY_INTERVAL)
            continue
        client.setblocking(False)
        task = asyncio.ensure_future(serve(client))
        clients.add(task)
        task.add_done_callback(clients.discard)


async def listen(path: str, port: int | None, dial: Dial) -> None:
    """Serve connections to a Unix socket at this path, until cancelled; the socket exists once this first waits."""
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        try:
            await accept(listener, lambda client: serve(client, port, dial))
        finally:
            os.unlink(path)  # noqa: PTH108 - pathlib costs as much to import as all the rest


class HostPorts:
    """The host's side of connections from a guest.  ``bind`` binds a host port, and raises OSError if another VM has
    it: all share them.  ``is_ours`` returns whether a connection is from our guest.
    """

    def __init__(self, bind: Callable[[int], socket.socket], is_ours: Callable[[socket.socket], bool]) -> None:
        self.bind = bind
        self.is_ours = is_ours


def host_ports(cid: int) -> HostPorts:
    """Return the kernel's host ports, for a guest."""

    def bind(port: int) -> socket.socket:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
            listener.bind((socket.VMADDR_CID_ANY, port))
            stack.pop_all()
            return listener

    return HostPorts(bind, lambda connection: connection.getpeername()[0] == cid)


async def serve_host_ports(hybrid: str, ports: HostPorts) -> None:
    """Relay the guest's connections to host ports to the sockets ``hybrid``_<port>, until cancelled.

    A port is bound while such a socket exists: the directory is polled.
    """
    directory, name = os.path.split(hybrid)
    bound: dict[int, asyncio.Task[None]] = {}
    try:
        while True:
            entries = [entry.partition(f"{name}_") for entry in os.listdir(directory)]  # noqa: PTH208
            wanted = {int(port) for before, _, port in entries if not before and port.isdecimal()}
            for port in wanted - bound.keys():
                with contextlib.suppress(OSError):  # another VM has it: retry
                    bound[port] = asyncio.create_task(serve_host_port(ports.bind(port), f"{hybrid}_{port}", ports))
            for port in bound.keys() - wanted:
                bound.pop(port).cancel()
            await asyncio.sleep(SCAN_INTERVAL)
    finally:
        for task in bound.values():
            task.cancel()


async def serve_host_port(listener: socket.socket, path: str, ports: HostPorts) -> None:
    """Relay connections to a host port to a Unix socket, if they are from our guest."""
    loop = asyncio.get_running_loop()

    async def serve(guest: socket.socket) -> None:
        with guest, socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            try:
                if ports.is_ours(guest):
                    await loop.sock_connect(client, path)
                    await join(guest, client)
            except* OSError:
                pass

    with listener:
        await accept(listener, serve)


async def relay(
    hybrid: str, raw: dict[str, int], dial: Dial, ready: Callable[[], None], ports: HostPorts | None = None
) -> None:
    """Serve all sockets until cancelled; ``ready`` is called when they accept connections.  With ``ports``, the guest's
    own connections, too.
    """
    async with asyncio.TaskGroup() as group:
        if ports:
            group.create_task(serve_host_ports(hybrid, ports))
        group.create_task(listen(hybrid, None, dial))
        for path, port in raw.items():
            group.create_task(listen(path, port, dial))
        await asyncio.sleep(0)  # each has reached its first wait
        ready()


async def main() -> None:
    """Run the command line."""
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

    task = asyncio.ensure_future(relay(options.socket, raw, dialler(options.cid), ready, host_ports(options.cid)))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    asyncio.run(main())

"""The process of a device: its command line, its sockets, its signals.

Serves QEMU on descriptor N, or the first to connect to --listen PATH, until that closes (exit status 0) or SIGTERM
arrives, and removes its sockets.  SIGUSR1 signals that the guest was reset: its connections are closed at once instead
of when its driver starts again.
"""

from __future__ import annotations

import argparse
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial

from .device import VsockDevice
from .host import Handshakes, HostError, UnixListener, dial
from .limits import DeviceLimits
from .log import RateLimitedLog
from .loop import Loop
from .protocol import Channel
from .session import Session


def main(argv: Sequence[str] | None = None, limits: DeviceLimits | None = None) -> int:
    """Run the device; returns the exit status: 0, 1 for a broken control socket, 2 for wrong arguments."""
    options = arguments(argv)
    limits = limits or DeviceLimits()
    log = RateLimitedLog(f"vsock {options.cid}", limits.log_burst)
    if sys.byteorder != "little":
        log("virtio is little-endian, this machine is not")
        return 2
    raise_descriptor_limit()
    try:
        control = socket.socket(fileno=options.fd) if options.listen is None else accept_one(options.listen)
    except OSError as error:
        log(f"{options.listen or f'--fd {options.fd}'}: {error.strerror}")
        return 2
    loop = Loop(log, limits.busy_poll)
    device = VsockDevice(options.cid, loop, log, limits, lambda port: dial(f"{options.socket}_{port}"))
    handshakes = Handshakes(loop, log, limits, partial(device.connect, greet=True))
    listeners: list[UnixListener] = []

    def has_room() -> bool:
        return device.has_room(handshakes.count)

    def listen(path: str, accepted: Callable[[socket.socket], None]) -> None:
        listeners.append(UnixListener(path, loop, log, limits, has_room, accepted))

    watch_signals(loop, device)
    session = Session(Channel(control), device, loop, log)
    try:
        listen(options.socket, handshakes.begin)
        for path, port in options.raw:
            listen(path, partial(device.connect, port=port, greet=False))
        if options.ready_fd is not None:
            announce(options.ready_fd)
        return loop.run(device)
    except HostError as error:
        log(str(error))
        return 2
    finally:
        for listener in listeners:
            listener.close()
        session.close()
        loop.close()


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vhost_user", description="A virtio-vsock device for QEMU, in user space.")
    control = parser.add_mutually_exclusive_group(required=True)
    control.add_argument("--fd", type=int, help="connected socket to QEMU's vhost-user chardev")
    control.add_argument("--listen", metavar="PATH", help="or where QEMU is to connect")
    parser.add_argument("--cid", type=cid, required=True, help="the guest's context id, 3 or more")
    parser.add_argument("--socket", required=True, help="hybrid socket; the guest's connections go to SOCKET_PORT")
    parser.add_argument("--raw", type=raw, action="append", default=[], metavar="PATH=PORT", help="for one guest port")
    parser.add_argument("--ready-fd", type=int, help="gets a newline, and is closed, when the sockets listen")
    return parser.parse_args(argv)


def accept_one(path: str) -> socket.socket:
    """Accept the first connection to a Unix socket of this path, and remove the socket.  Raises OSError."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        try:
            server.listen(1)
            return server.accept()[0]
        finally:
            os.unlink(path)  # noqa: PTH108


def cid(text: str) -> int:
    number = int(text)
    if not 3 <= number < 0xFFFFFFFF:
        raise argparse.ArgumentTypeError(f"{text} is not a guest's context id (3 to 4294967294)")
    return number


def raw(text: str) -> tuple[str, int]:
    path, equals, port = text.rpartition("=")
    if not equals or not path or not port.isdigit() or int(port) >= 0xFFFFFFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATH=PORT")
    return path, int(port)


def announce(fd: int) -> None:
    """Announce that the sockets listen."""
    try:
        os.write(fd, b"\n")
        os.close(fd)
    except OSError as error:
        raise HostError(f"--ready-fd {fd}: {error.strerror}") from None


def raise_descriptor_limit() -> None:
    """Raise the descriptor limit: each connection needs one."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def watch_signals(loop: Loop, device: VsockDevice) -> None:
    """Turn signals into events: a handler could run between any two byte codes, and see inconsistent state."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def ready(mask: int) -> None:
        for number in os.read(reader, 64):
            if number == signal.SIGUSR1:
                device.drop_connections()
            else:
                loop.stop(0)

    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: None)
    loop.add(reader, select.EPOLLIN, ready, lambda error: loop.stop(1))

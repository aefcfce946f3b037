"""The two ways to a guest's vsock behind one interface: a process that keeps the VM's sockets, and an fd for QEMU.

Both processes have the same command line: ``… --cid CID --socket S --raw A=PORT [--ready-fd N]``, and need the standard
library alone.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from caisson.image.vm.directory import VMDirectory
from caisson.image.vm.errors import VMError
from caisson.image.vm.vsock import vhost
from caisson.proto.contract import AGENT_PORT

HERE = Path(__file__).resolve().parent

#: The program of each kind of device.
BACKENDS = {"user": "vhost_user", "vhost": "relay.py"}

#: With our own device each VM is a world of its own, so one number does for all of them.
USER_CID = 3

#: Seconds for a back end to have its sockets.
STARTING = 20.0


@dataclass(frozen=True)
class Device:
    """A vsock device: ``command`` runs its back end, which needs ``backend_fds``; ``fd`` and ``cid`` are for QEMU."""

    command: Sequence[str]
    backend_fds: Sequence[int]
    fd: int
    cid: int
    _ready: int
    _handed_over: contextlib.ExitStack

    def hand_over(self) -> None:
        """To be called when the back end and QEMU have their descriptors: without ours, each sees the other's end."""
        self._handed_over.close()

    def wait(self) -> None:
        """Return when the sockets take connections.  Raises VMError when the back end ends instead."""
        answered, _, _ = select.select([self._ready], [], [], STARTING)
        if not answered or os.read(self._ready, 1) != b"\n":
            raise VMError("the vsock device did not start")


def backend(kind: str, directory: VMDirectory, cid: int, more: Sequence[str]) -> list[str]:
    """The command of the back end for the VM in a directory."""
    return [
        # Isolated and without site: it starts in half the time.
        sys.executable, "-I", "-S", str(HERE / BACKENDS[kind]), *more,
        "--cid", str(cid),
        "--socket", str(directory.vsock_socket),
        "--raw", f"{directory.agent_socket}={AGENT_PORT}",
    ]  # fmt: skip


@contextlib.contextmanager
def prepare(kind: str, directory: VMDirectory, user_cid: int = USER_CID) -> Iterator[Device]:
    """A device of a kind (``user`` or ``vhost``) for the VM in a directory.  Raises VMError."""
    with contextlib.ExitStack() as stack:
        ready, ready_there = os.pipe()
        stack.callback(os.close, ready)
        handed_over = stack.enter_context(contextlib.ExitStack())
        handed_over.callback(os.close, ready_there)
        backend_fds = [ready_there]
        words = ["--ready-fd", str(ready_there)]
        if kind == "user":
            ours, theirs = socket.socketpair()
            handed_over.enter_context(ours)
            handed_over.enter_context(theirs)
            fd, cid = ours.fileno(), user_cid
            backend_fds.append(theirs.fileno())
            words += ["--fd", str(theirs.fileno())]
        else:
            fd, cid = vhost.allocate()
            handed_over.callback(os.close, fd)
        command = backend(kind, directory, cid, words)
        yield Device(command, backend_fds, fd, cid, ready, handed_over)

"""The two ways to a guest's vsock behind one interface: a process that keeps the VM's sockets, and an fd for QEMU.

Both are a module with the same command line: ``python -m image.vm.vsock.{vhost_user,vhost} --socket S --raw A=1024 …``.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from image.vm.directory import VMDirectory
from image.vm.errors import VMError
from image.vm.vsock import vhost

#: The port that the agent listens on, and so where agent.sock leads.
AGENT_PORT = 1024

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
    started: Callable[[], None]


@contextlib.contextmanager
def prepare(kind: str, directory: VMDirectory) -> Iterator[Device]:
    """A device of a kind (``user`` or ``vhost``) for the VM in a directory.

    Call ``started`` after the back end was spawned: it returns when the sockets take connections, and raises VMError
    when the back end ends instead.
    """
    with contextlib.ExitStack() as stack:
        ready, ready_there = os.pipe()
        stack.callback(os.close, ready)
        if kind == "user":
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            module, fd, cid = "image.vm.vsock.vhost_user", ours.fileno(), USER_CID
            fds, words = [theirs.detach(), ready_there], ["--fd"]
            words.append(str(fds[0]))
        else:
            fd, cid = vhost.allocate()
            stack.callback(os.close, fd)
            module, fds, words = "image.vm.vsock.vhost", [ready_there], []
        command = [
            sys.executable, "-m", module, *words,
            "--cid", str(cid),
            "--socket", str(directory.vsock_socket),
            "--raw", f"{directory.agent_socket}={AGENT_PORT}",
            "--ready-fd", str(ready_there),
        ]  # fmt: skip
        spawning = contextlib.ExitStack()  # closes what is the back end's alone
        stack.enter_context(spawning)
        for theirs_alone in fds:
            spawning.callback(os.close, theirs_alone)

        def started() -> None:
            spawning.close()  # from here on an end of file means that the back end has ended
            answered, _, _ = select.select([ready], [], [], STARTING)
            if not answered or os.read(ready, 1) != b"\n":
                raise VMError("the vsock device did not start")

        yield Device(command, fds, fd, cid, started)

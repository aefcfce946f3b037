"""The two vsock devices behind one interface: a back-end process with the VM's sockets, and a descriptor for QEMU.

``vhost`` is the kernel's device: an open /dev/vhost-vsock that owns a context id, with relay.py beside it; ``user`` is
our own vhost-user device.  Both processes have the same command line: ``… --cid CID --socket S --raw A=PORT
[--ready-fd N]``, and need only the standard library.

Sources: vsock(7); Linux, include/uapi/linux/vhost.h and drivers/vhost/vsock.c (VHOST_VSOCK_SET_GUEST_CID).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from caisson.image.vm.accel import VHOST_VSOCK
from caisson.image.vm.directory import VMDirectory
from caisson.image.vm.errors import VMError
from caisson.image.vm.pace import scaled
from caisson.proto.contract import AGENT_PORT
from caisson.proto.record import Record

HERE = Path(__file__).resolve().parent

#: The program of each kind of device.
BACKENDS = {"user": "vhost_user/__main__.py", "vhost": "relay.py"}

#: With our own device VMs are isolated from each other, so all use the same context id.
USER_CID = 3

#: Ids 0-2 are reserved (vsock(7)); the upper half is left for manual choice.
FIRST_CID, LAST_CID = 3, 0x7FFFFFFF
MAX_CID_ATTEMPTS = 100

#: _IOW(VHOST_VIRTIO, 0x60, __u64)
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60

#: Seconds for a back end to open its sockets.
START_TIMEOUT = 20.0


class Backend(Record):
    """A vsock device: ``command`` runs its back end, which needs ``backend_fds``; ``fd`` and ``cid`` are for QEMU."""

    command: Sequence[str]
    backend_fds: Sequence[int]
    fd: int
    cid: int
    _ready: int
    _inherited: contextlib.ExitStack

    def close_inherited(self) -> None:
        """Close our copies of inherited descriptors, so that the back end and QEMU see each other close."""
        self._inherited.close()

    def wait(self) -> None:
        """Wait until the sockets accept connections.  Raises VMError if the back end exits instead."""
        answered, _, _ = select.select([self._ready], [], [], scaled(START_TIMEOUT))
        if not answered or os.read(self._ready, 1) != b"\n":
            raise VMError(f"vsock device: did not start within {scaled(START_TIMEOUT):.0f} s")


def command(kind: str, directory: VMDirectory, cid: int, more: Sequence[str]) -> list[str]:
    """Return the command of the back end for the VM in a directory."""
    return [
        # Isolated and without site: it starts in half the time.
        sys.executable, "-I", "-S", str(HERE / BACKENDS[kind]), *more,
        "--cid", str(cid),
        "--socket", str(directory.vsock_socket),
        "--raw", f"{directory.agent_socket}={AGENT_PORT}",
    ]  # fmt: skip


def random_cid() -> int:
    """Return a random context id."""
    return FIRST_CID + int.from_bytes(os.urandom(8), "little") % (LAST_CID - FIRST_CID + 1)


@contextlib.contextmanager
def prepare(kind: str, directory: VMDirectory, user_cid: int = USER_CID) -> Iterator[Backend]:
    """Open the resources of a device (``user`` or ``vhost``) for the VM in a directory.  Raises VMError."""
    with contextlib.ExitStack() as stack:
        ready, ready_there = os.pipe()
        stack.callback(os.close, ready)
        inherited = stack.enter_context(contextlib.ExitStack())
        inherited.callback(os.close, ready_there)
        backend_fds = [ready_there]
        words = ["--ready-fd", str(ready_there)]
        if kind == "user":
            ours, theirs = socket.socketpair()
            inherited.enter_context(ours)
            inherited.enter_context(theirs)
            fd, cid = ours.fileno(), user_cid
            backend_fds.append(theirs.fileno())
            words += ["--fd", str(theirs.fileno())]
        else:
            fd, cid = open_vhost()
            inherited.callback(os.close, fd)
        yield Backend(command(kind, directory, cid, words), backend_fds, fd, cid, ready, inherited)


def open_vhost(device: Path = VHOST_VSOCK, ioctl: Callable[[int, int, bytes], object] = fcntl.ioctl) -> tuple[int, int]:
    """Open /dev/vhost-vsock with a free context id; returns the descriptor and the id.  Raises VMError.

    The kernel rejects an id in use, and reserves it while the device is open, so two VMs started at once cannot get the
    same one.
    """
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise VMError(f"{device} cannot be opened: {os.strerror(error.errno or 0)}") from error
    try:
        for _ in range(MAX_CID_ATTEMPTS):
            cid = random_cid()
            try:
                ioctl(descriptor, VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
                return descriptor, cid
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise VMError(f"{device} refuses a guest CID: {os.strerror(error.errno or 0)}") from error
        raise VMError(f"{device}: no free guest CID in {MAX_CID_ATTEMPTS} attempts")
    except VMError:
        os.close(descriptor)
        raise

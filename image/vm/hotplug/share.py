"""Host directories, plugged into a running VM through QEMU's monitor, and unplugged again.

They use virtiofs: QEMU cannot hot-plug 9p (there is no command for an fsdev).  It needs memory that virtiofsd can map,
which all VMs have except clones with the kernel's vsock device.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from caisson.image.vm.config import TAG
from caisson.image.vm.errors import InvalidOption, VMError
from caisson.image.vm.hotplug import virtiofs
from caisson.image.vm.hotplug.disks import MONITOR_TIMEOUT, empty_port, monitor_of, plugged, unplugged
from caisson.image.vm.jsonsocket import JSONSocket
from caisson.image.vm.pace import scaled
from caisson.image.vm.qmp import QMP, QMPError
from caisson.image.vm.running import RunningVM
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Shared(Record):
    """A share to mount: the file system's type and tag.  ``new``: it did not exist before."""

    fstype: str
    tag: str
    writable: bool
    new: bool = False


def tag_of(path: Path) -> str:
    """Return the default tag of a directory: its name, as far as it is valid in a tag."""
    name = re.sub(r"[^A-Za-z0-9_-]", "-", path.resolve().name).lstrip("-_0123456789")
    return name[:31] or "share"


def shares(vm: RunningVM) -> dict[str, tuple[str, str, bool]]:
    """Return a VM's shares by tag: file system, directory, and whether the guest may write to it."""
    info = vm.info
    return {
        tag: (fstype, path, writable)
        for fstype, found in (("9p", info["shares"]), ("virtiofs", info["virtiofs"]))
        for tag, (path, writable) in found.items()
    }


def share_of_namespace(vm: RunningVM, directory: str, tag: str, mount_namespace: int) -> None:
    """Share an absolute path, writable, as seen in another mount namespace, given by its descriptor.

    Later mounts there also appear, if the directory's mount is shared.  Raises VMError.
    """
    with _alone(vm):
        _plug_new(vm, {"share": tag, "path": directory, "writable": True}, [mount_namespace])


def share(vm: RunningVM, directory: Path, tag: str = "", *, writable: bool) -> Shared:
    """Share a directory with a guest, through an existing share or a new one.  Raises VMError.

    An existing one is used whatever its tag, and a writable one also for reading.  A new one without a ``tag`` gets a
    free one derived from the directory's name.
    """
    path = directory.resolve()
    if tag and not TAG.fullmatch(tag):
        raise InvalidOption(f"--tag {tag}: is not a valid tag; give up to 31 letters, digits, - and _, a letter first")
    if not path.is_dir():
        raise InvalidOption(f"{directory}: is not a directory; name one to share")
    with _alone(vm):
        return _share(vm, path, tag, writable)


def _share(vm: RunningVM, path: Path, tag: str, writable: bool) -> Shared:
    there = shares(vm)
    for other, (fstype, shared, may_write) in list(there.items()):
        if shared != str(path) or (writable and not may_write):
            continue
        if fstype == "9p" or _is_plugged(vm, other):
            return Shared(fstype, other, writable)
        _request(vm, {"unshare": other})  # its creator was killed
        del there[other]
        break
    tag = _free_tag(tag, path, there, vm)
    _plug_new(vm, {"share": tag, "path": str(path), "writable": writable})
    return Shared("virtiofs", tag, writable, new=True)


def _plug_new(vm: RunningVM, question: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Make the supervisor start a virtiofsd, and plug it in.  Raises VMError."""
    tag = question["share"]
    if vm.info["snapshot"] and vm.info["vsock"] != "user":
        raise VMError(
            f"VM {vm.name!r}: has its snapshot's memory, which virtiofsd must not map, and 9p cannot be added while it "
            f"runs; make a clone with --vsock user, or boot with the share: "
            f"caisson boot-vm --share {tag}={question['path']}"
        )
    answer = _request(vm, question, fds)
    try:
        with monitor_of(vm) as monitor:
            _plug(monitor, vm, tag, answer["socket"])
    except BaseException:
        _request(vm, {"unshare": tag})
        raise


def _free_tag(tag: str, path: Path, there: Mapping[str, tuple[str, str, bool]], vm: RunningVM) -> str:
    """Return the tag for a new share.  Raises VMError if the requested one is in use."""
    if not tag:
        tag = first = tag_of(path)
        number = 2
        while tag in there:
            tag = f"{first[:28]}-{number}"
            number += 1
        return tag
    if tag not in there:
        return tag
    fstype, shared, may_write = there[tag]
    mode = "writable" if may_write else "read-only"
    change = f"unshare it first: caisson unshare {tag} --name {vm.name}, or " if fstype == "virtiofs" else ""
    raise VMError(f"--tag {tag}: is in use for {shared} ({mode}); {change}choose another tag")


@contextlib.contextmanager
def _alone(vm: RunningVM) -> Iterator[None]:
    """Change the shares of a VM exclusively: incomplete ones were left by a process that died."""
    try:
        lock = (vm.directory / "shares.lock").open("w")
    except FileNotFoundError:
        raise VMError(f"VM {vm.name!r}: has ended; start it: caisson boot-vm {vm.name} --detach") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_plugged(vm: RunningVM, tag: str) -> bool:
    with monitor_of(vm) as monitor:
        return any(f"share-{tag}" in devices for devices in plugged(monitor).values())


def _plug(monitor: QMP, vm: RunningVM, tag: str, path: str) -> None:
    bus = empty_port(monitor, vm.name)
    connect, add = virtiofs.plug(tag, path, bus)
    with contextlib.suppress(QMPError):  # left by a killed process
        monitor.execute("chardev-remove", {"id": f"chardev-{tag}"})
    monitor.execute(*connect)
    try:
        monitor.execute(*add)
    except QMPError:
        monitor.execute("chardev-remove", {"id": f"chardev-{tag}"})
        raise


def unshare(vm: RunningVM, tag: str) -> None:
    """Unplug a share that is no longer mounted in the guest.  Raises VMError."""
    with _alone(vm):
        _unshare(vm, tag)


def end_server(vm: RunningVM, tag: str) -> None:
    """Stop the virtiofsd of a share, and with it all use of the host's files: the guest, about to stop, gets errors.

    Raises VMError.
    """
    _request(vm, {"unshare": tag})


def _unshare(vm: RunningVM, tag: str) -> None:
    there = shares(vm)
    if tag not in there:
        raise VMError(
            f"share {tag!r}: VM {vm.name!r} has none of this tag; there are: {', '.join(sorted(there)) or 'none'}"
        )
    if there[tag][0] == "9p":
        raise VMError(f"share {tag!r}: was set up when VM {vm.name!r} booted, and stays until it stops")
    with monitor_of(vm) as monitor:
        with contextlib.suppress(QMPError):  # it is gone, or about to go
            monitor.execute("device_del", {"id": f"share-{tag}"})
        if not unplugged(monitor, f"share-{tag}"):
            raise VMError(f"the guest of VM {vm.name!r} keeps {tag!r}: it is still mounted there")
        with contextlib.suppress(QMPError):
            monitor.execute("chardev-remove", {"id": f"chardev-{tag}"})
    _request(vm, {"unshare": tag})


def _request(vm: RunningVM, question: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
    """Send a request to a VM's supervisor; returns its response.  Raises VMError."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(vm.directory / "control.sock"))
            lines = JSONSocket(connection)
            lines.send(question, fds)
            answer = lines.receive(scaled(MONITOR_TIMEOUT))
        except OSError as error:
            raise VMError(f"VM {vm.name!r}: its supervisor does not answer: {error.strerror or error}") from error
    if answer is None or "error" in answer:
        gone = f"VM {vm.name!r}: has ended; start it: caisson boot-vm {vm.name} --detach"
        raise VMError(str(answer["error"]) if answer else gone)
    return answer

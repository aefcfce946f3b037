"""Disks for a running VM: plugged into its empty ports through QEMU's monitor, and unplugged again.

The caller names a disk, so that a second caller uses the existing one.  QEMU's monitor serves one client at a time: a
connection has exclusive access to the ports.  QEMU gets a file's descriptor: it has no access of its own to write to.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Container
from pathlib import Path

from caisson.image.vm.errors import NoEmptyPort, VMError
from caisson.image.vm.pace import scaled
from caisson.image.vm.qemu import PORTS
from caisson.image.vm.qmp import QMP, QMPError
from caisson.image.vm.running import RunningVM

#: Seconds for the monitor, including other clients before us.
MONITOR_TIMEOUT = 30.0

#: Seconds for a guest to release a disk, and between polls.
UNPLUG_TIMEOUT = 10.0
POLL_INTERVAL = 0.05

PREFIX = "disk-"

#: QEMU's path of named devices.
PERIPHERAL = "/machine/peripheral"


def monitor_of(vm: RunningVM, timeout: float = MONITOR_TIMEOUT) -> QMP:
    """Connect to QEMU's monitor; ``timeout`` in seconds is for that, and for each command.  Raises VMError."""
    return QMP(vm.directory / "qmp.sock", scaled(timeout))


def plug_disk(vm: RunningVM, file: Path, name: str, *, writable: bool = False, spare: int = 0) -> str:
    """Plug in a disk, unless one of this name already is; returns its PCI path, slots from the root bus on ("10/00").

    ``name``: at most 26 letters, digits and '-'.  The file may be removed afterwards.  Raises VMError, NoEmptyPort if
    no more than ``spare`` ports are empty.
    """
    identity = f"{PREFIX}{name}"
    with monitor_of(vm) as monitor:
        for port, devices in plugged(monitor).items():
            if identity in devices:
                return _path(port)
        empty = empty_port(monitor, vm.name, spare)
        # The block node of a disk that the guest has released since.
        with contextlib.suppress(QMPError):
            monitor.execute("blockdev-del", {"node-name": identity})
        _open(monitor, file, identity, writable)
        try:
            device = {"driver": "virtio-blk-pci", "id": identity, "drive": identity, "bus": empty}
            monitor.execute("device_add", device)
        except QMPError:
            monitor.execute("blockdev-del", {"node-name": identity})
            raise
        return _path(empty)


def _open(monitor: QMP, file: Path, identity: str, writable: bool) -> None:
    """Give QEMU a file as a raw image: whatever a guest writes to it, it is never taken for another format.

    QEMU locks it: two VMs cannot write to one file.  Raises VMError.
    """
    try:
        fd = os.open(file, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise VMError(f"{file}: {error.strerror}") from error
    try:
        fds = monitor.execute("add-fd", fds=[fd])["fdset-id"]
    finally:
        os.close(fd)
    try:
        opened = {"driver": "file", "filename": f"/dev/fdset/{fds}", "read-only": not writable}
        node = {"driver": "raw", "node-name": identity, "read-only": not writable, "file": opened}
        monitor.execute("blockdev-add", node)
    finally:
        monitor.execute("remove-fd", {"fdset-id": fds})  # the block node has a duplicate


def unplug_disk(vm: RunningVM, name: str) -> bool:
    """Unplug a disk, and close its file; False if the guest did not release it in time.  Raises VMError."""
    with monitor_of(vm) as monitor:
        return not _unplug(monitor, {f"{PREFIX}{name}"})


def unplug_unused(vm: RunningVM, used: Callable[[], Container[str]]) -> None:
    """Unplug the disks whose names are not among those in use.

    ``used`` is called while no disk can be plugged in: callers register a disk before plugging it in.  A guest that
    does not release a disk in time keeps it.  Raises VMError.
    """
    with monitor_of(vm) as monitor:
        names = used()
        unused = {
            identity
            for devices in plugged(monitor).values()
            for identity in devices
            if identity.startswith(PREFIX) and identity.removeprefix(PREFIX) not in names
        }
        _unplug(monitor, unused)


def _unplug(monitor: QMP, disks: set[str]) -> set[str]:
    """Unplug disks, and close their files; returns those that the guest did not release in time."""
    left = set(disks)
    for identity in disks:
        with contextlib.suppress(QMPError):  # already being unplugged
            monitor.execute("device_del", {"id": identity})
    deadline = time.monotonic() + scaled(UNPLUG_TIMEOUT)
    while left and time.monotonic() < deadline:
        there = set().union(*plugged(monitor).values())
        for identity in left - there:
            # It looks gone too early: the disk's block node disappears a moment later.
            with contextlib.suppress(QMPError):
                monitor.execute("blockdev-del", {"node-name": identity})
                left.discard(identity)
        if left:
            time.sleep(POLL_INTERVAL)
    return left


def empty_port(monitor: QMP, name: str, spare: int = 0) -> str:
    """Return an empty port.  Raises NoEmptyPort if no more than ``spare`` are empty."""
    empty = [port for port, devices in plugged(monitor).items() if not devices]
    if len(empty) > spare:
        return empty[0]
    kept = f" but {spare}, kept for others," if spare else ""
    raise NoEmptyPort(
        f"VM {name!r}: has {len(PORTS)} ports for disks and shares, and all{kept} are in use; remove a container, or a "
        "share"
    )


def unplugged(monitor: QMP, identity: str) -> bool:
    """Wait for a device to be unplugged; True if the guest released it in time."""
    deadline = time.monotonic() + scaled(UNPLUG_TIMEOUT)
    while any(identity in devices for devices in plugged(monitor).values()):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_INTERVAL)
    return True


def plugged(monitor: QMP) -> dict[str, set[str]]:
    """Return the ids of the devices that are plugged into each port.

    From QEMU's own objects: query-pci depends on how the guest numbers its buses.
    """
    found: dict[str, set[str]] = {f"port{number}": set() for number in range(len(PORTS))}
    for item in monitor.execute("qom-list", {"path": PERIPHERAL}):
        if not item["type"].startswith("child<"):
            continue
        with contextlib.suppress(QMPError):  # it has just been removed
            bus = monitor.execute("qom-get", {"path": f"{PERIPHERAL}/{item['name']}", "property": "parent_bus"})
            found.get(str(bus).rpartition("/")[2], set()).add(item["name"])
    return found


def _path(port: str) -> str:
    return f"{PORTS[int(port.removeprefix('port'))]}/00"

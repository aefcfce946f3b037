"""Disks for a running VM: plugged into its empty ports, read-only, through QEMU's monitor, and unplugged again.

The caller names a disk, so that a second caller uses the existing one.  QEMU's monitor serves one client at a time: a
connection has exclusive access to the ports.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Container
from pathlib import Path

from caisson.image.vm.errors import VMError
from caisson.image.vm.machine import VM
from caisson.image.vm.pace import scaled
from caisson.image.vm.qemu import PORTS
from caisson.image.vm.qmp import QMP, QMPError

#: Seconds for the monitor, including other clients before us.
MONITOR_TIMEOUT = 30.0

#: Seconds for a guest to release a disk, and between polls.
UNPLUG_TIMEOUT = 10.0
POLL_INTERVAL = 0.05

PREFIX = "disk-"

#: QEMU's path of named devices.
PERIPHERAL = "/machine/peripheral"


def plug_disk(vm: VM, file: Path, name: str) -> str:
    """Plug in a disk, unless one of this name already is; returns its PCI path, slots from the root bus on ("10/00").

    ``name``: at most 26 letters, digits and '-'.  The file may be removed afterwards.  Raises VMError if no port is
    empty.
    """
    identity = f"{PREFIX}{name}"
    with QMP(vm.directory / "qmp.sock", scaled(MONITOR_TIMEOUT)) as monitor:
        ports = plugged(monitor)
        for port, devices in ports.items():
            if identity in devices:
                return _path(port)
        empty = empty_port(monitor, vm.name)
        # The block node of a disk that the guest has released since.
        with contextlib.suppress(QMPError):
            monitor.execute("blockdev-del", {"node-name": identity})
        opened = {"driver": "file", "filename": str(file), "read-only": True}
        node = {"driver": "raw", "node-name": identity, "read-only": True, "file": opened}
        monitor.execute("blockdev-add", node)
        try:
            device = {"driver": "virtio-blk-pci", "id": identity, "drive": identity, "bus": empty}
            monitor.execute("device_add", device)
        except QMPError:
            monitor.execute("blockdev-del", {"node-name": identity})
            raise
        return _path(empty)


def unplug_unused(vm: VM, used: Callable[[], Container[str]]) -> None:
    """Unplug the disks whose names are not among those in use.

    ``used`` is called while no disk can be plugged in: callers register a disk before plugging it in.  A guest that
    does not release a disk in time keeps it.  Raises VMError.
    """
    with QMP(vm.directory / "qmp.sock", scaled(MONITOR_TIMEOUT)) as monitor:
        names = used()
        unused = {
            identity
            for devices in plugged(monitor).values()
            for identity in devices
            if identity.startswith(PREFIX) and identity.removeprefix(PREFIX) not in names
        }
        for identity in unused:
            with contextlib.suppress(QMPError):  # already being unplugged
                monitor.execute("device_del", {"id": identity})
        deadline = time.monotonic() + scaled(UNPLUG_TIMEOUT)
        while unused and time.monotonic() < deadline:
            there = set().union(*plugged(monitor).values())
            for identity in unused - there:
                # It looks gone too early: the disk's block node disappears a moment later.
                with contextlib.suppress(QMPError):
                    monitor.execute("blockdev-del", {"node-name": identity})
                    unused.discard(identity)
            time.sleep(POLL_INTERVAL)


def empty_port(monitor: QMP, name: str) -> str:
    """Return an empty port.  Raises VMError if there is none."""
    for port, devices in plugged(monitor).items():
        if not devices:
            return port
    raise VMError(
        f"VM {name!r}: has {len(PORTS)} ports for disks and shares, and all are in use; remove a container, or a share"
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

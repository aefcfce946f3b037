"""Disks that the host plugs in: map the host's identifiers to nodes in /dev.

sysfs is polled instead of listening to uevents: that also finds earlier disks, and a disk with a node in /dev is ready.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat

from caisson.agent.base.errors import DeviceTimeout, InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

INTERVAL = 0.02
PCI_PATH = re.compile(r"[0-9a-f]{2}(\.[0-7])?(/[0-9a-f]{2}(\.[0-7])?)*")

#: More than a bus has slots: if a PCI path begins with at least this number, it is a root bus (NUMA).
SLOTS = 0x20
SCSI_ADDRESS = re.compile(r"[0-9]+:[0-9]+")
PMEM = re.compile(r"/dev/pmem[0-9]+")
CCW = re.compile(r"[0-9a-f]\.[0-9a-f]\.[0-9a-f]{4}")


class BlockDevices:
    """Find disks, waiting up to `seconds` for one being plugged in."""

    def __init__(self, seconds: float = 3.0, *, sys: str = "/sys", dev: str = "/dev") -> None:
        self._seconds = seconds
        self._sys = sys
        self._dev = dev

    def node(self, path: str) -> str:
        """Return the node of a device that exists.  Raises InvalidArgument."""
        try:
            mode = os.stat(path).st_mode  # noqa: PTH116 - no pathlib at start
        except OSError:
            raise InvalidArgument(f"invalid device {path}") from None
        if not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            raise InvalidArgument(f"invalid device {path}")
        return path

    async def wait_for_node(self, path: str) -> str:
        """Return a node by its path, once it exists.  Raises InvalidArgument or DeviceTimeout."""
        if path.startswith(f"{self._dev}/"):
            await self._wait(lambda: path if os.path.exists(path) else None, path)  # noqa: PTH110 - no pathlib at start
        return path

    async def pci(self, path: str) -> str:
        """Find the disk at a PCI path: slots, in hexadecimal, from the root bus down ("02" or "02/01").

        A slot may have a function ("02.1"), and a root bus other than the first comes before ("20/00/01").  Raises
        InvalidArgument or DeviceTimeout.
        """
        if not PCI_PATH.fullmatch(path):
            raise InvalidArgument(f"invalid PCI path {path}")
        self._write("bus/pci/rescan", "1")
        return await self._wait(lambda: self._below_pci(path.split("/")), path)

    def _below_pci(self, slots: list[str]) -> str | None:
        bus = "0000:00"
        if int(slots[0][:2], 16) >= SLOTS and len(slots) > 1:
            bus, slots = f"0000:{slots[0][:2]}", slots[1:]
        place = self._root_bus(bus)
        for number, slot in enumerate(slots):
            place = f"{place}/{bus}:{slot}" if "." in slot else f"{place}/{bus}:{slot}.0"
            if number < len(slots) - 1:
                buses = _names(f"{place}/pci_bus")
                if not buses:
                    return None
                if len(buses) > 1:
                    raise InvalidArgument(f"Expected exactly one PCI bus in {place}/pci_bus, got {len(buses)} instead")
                bus = buses[0]
        return self._disk_in([f"{place}/{name}" for name in _names(place) if name.startswith("virtio")])

    def _root_bus(self, bus: str) -> str:
        """Return the directory of a root bus, which on arm64 may be below its host bridge."""
        bridges = [f"devices/platform/{name}" for name in _names(f"{self._sys}/devices/platform") if "pci" in name]
        places = [f"{self._sys}/{parent}/pci{bus}" for parent in ("devices", *bridges)]
        return next((place for place in places if os.path.isdir(place)), places[0])  # noqa: PTH112

    async def scsi(self, address: str) -> str:
        """Find the disk at "ID:LUN" of any SCSI host.  Raises InvalidArgument or DeviceTimeout."""
        if not SCSI_ADDRESS.fullmatch(address):
            raise InvalidArgument(f"invalid SCSI address {address}")
        for host in _names(f"{self._sys}/class/scsi_host"):
            self._write(f"class/scsi_host/{host}/scan", f"0 {address.replace(':', ' ')}")
        return await self._wait(lambda: self._of_scsi(address), address)

    def _of_scsi(self, address: str) -> str | None:
        place = f"{self._sys}/class/scsi_device"
        names = [name for name in _names(place) if name.partition(":")[2] == f"0:{address}"]
        return self._disk_in([f"{place}/{name}/device" for name in names])

    async def pmem(self, path: str) -> str:
        """Find a persistent memory device by its node.  Raises InvalidArgument or DeviceTimeout."""
        if not PMEM.fullmatch(path):
            raise InvalidArgument(f"invalid nvdimm source path: {path}")
        name = path.rpartition("/")[2]
        return await self._wait(lambda: self._node_of(name), path)

    async def ccw(self, address: str) -> str:
        """Find a disk on the channel bus of s390x.  Raises InvalidArgument or DeviceTimeout."""
        if not CCW.fullmatch(address):
            raise InvalidArgument(f"invalid CCW device {address}")
        place = f"{self._sys}/bus/ccw/devices/{address}"
        found = lambda: self._disk_in([f"{place}/{name}" for name in _names(place) if name.startswith("virtio")])  # noqa: E731
        return await self._wait(found, address)

    def _disk_in(self, devices: list[str]) -> str | None:
        for device in devices:
            for name in _names(f"{device}/block"):
                return self._node_of(name)
        return None

    def _node_of(self, name: str) -> str | None:
        node = f"{self._dev}/{name}"
        return node if os.path.exists(node) else None  # noqa: PTH110 - no pathlib at start

    async def _wait(self, find: Callable[[], str | None], what: str) -> str:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._seconds
        while (found := find()) is None:
            if loop.time() >= deadline:
                raise DeviceTimeout(device=what, seconds=self._seconds)
            await asyncio.sleep(INTERVAL)
        return found

    def _write(self, file: str, text: str) -> None:
        """Make the kernel rescan a bus; does nothing if there is no such bus."""
        try:
            with open(f"{self._sys}/{file}", "w") as stream:  # noqa: PTH123 - a sysfs file
                stream.write(text)
        except OSError:
            pass


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))  # noqa: PTH208 - no pathlib at start
    except OSError:
        return []

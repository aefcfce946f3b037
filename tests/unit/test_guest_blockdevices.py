"""Test finding disks by the host's identifiers, in trees like those of sysfs and /dev."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from caisson.agent.base.errors import InvalidArgument, Timeout
from caisson.agent.guest.blockdevices import BlockDevices


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("sys/devices/pci0000:00", "sys/bus/pci", "sys/class/scsi_host/host0", "sys/class/scsi_device", "dev"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path / "sys", tmp_path / "dev"


def plug(trees: tuple[Path, Path], place: str, name: str) -> None:
    (trees[0] / place / "block" / name).mkdir(parents=True)
    (trees[1] / name).touch()


def find(
    trees: tuple[Path, Path], how: Callable[[BlockDevices], Awaitable[str]], *, later: Callable[[], None] | None = None
) -> str:
    async def work() -> str:
        devices = BlockDevices(0.3 if later is None else 20, sys=str(trees[0]), dev=str(trees[1]))
        looking = asyncio.ensure_future(how(devices))
        await asyncio.sleep(0)
        if later is not None:
            assert not looking.done()
            later()
        return await looking

    return asyncio.run(work())


def test_on_the_root_bus(trees: tuple[Path, Path]) -> None:
    plug(trees, "devices/pci0000:00/0000:00:02.0/virtio3", "vdb")
    assert find(trees, lambda devices: devices.pci("02")) == f"{trees[1]}/vdb"
    assert (trees[0] / "bus/pci/rescan").read_text() == "1"


def test_a_function_of_a_slot_and_another_root_bus(trees: tuple[Path, Path]) -> None:
    plug(trees, "devices/pci0000:00/0000:00:02.1/virtio3", "vdb")
    bridge = "devices/pci0000:20/0000:20:00.0"
    (trees[0] / bridge / "pci_bus/0000:21").mkdir(parents=True)
    plug(trees, f"{bridge}/0000:21:02.0/virtio4", "vdc")
    assert find(trees, lambda devices: devices.pci("02.1")) == f"{trees[1]}/vdb"
    assert find(trees, lambda devices: devices.pci("20/00/02")) == f"{trees[1]}/vdc"


def test_the_bus_of_a_host_bridge(trees: tuple[Path, Path]) -> None:
    (trees[0] / "devices/pci0000:00").rmdir()
    plug(trees, "devices/platform/4010000000.pcie/pci0000:00/0000:00:02.0/virtio3", "vdb")
    assert find(trees, lambda devices: devices.pci("02")) == f"{trees[1]}/vdb"


def test_behind_a_bridge_and_late(trees: tuple[Path, Path]) -> None:
    bridge = "devices/pci0000:00/0000:00:1e.0"
    (trees[0] / bridge / "pci_bus/0000:01").mkdir(parents=True)
    late = lambda: plug(trees, f"{bridge}/0000:01:0a.0/virtio9", "vdc")  # noqa: E731
    assert find(trees, lambda devices: devices.pci("1e/0a"), later=late) == f"{trees[1]}/vdc"


def test_a_disk_without_a_node_is_not_complete(trees: tuple[Path, Path]) -> None:
    place = "devices/pci0000:00/0000:00:02.0/virtio3"
    (trees[0] / place / "block/vdb").mkdir(parents=True)
    late = lambda: (trees[1] / "vdb").touch()  # noqa: E731
    assert find(trees, lambda devices: devices.pci("02"), later=late) == f"{trees[1]}/vdb"


def test_a_bridge_with_two_buses(trees: tuple[Path, Path]) -> None:
    for bus in ("0000:01", "0000:02"):
        (trees[0] / "devices/pci0000:00/0000:00:1e.0/pci_bus" / bus).mkdir(parents=True)
    with pytest.raises(InvalidArgument, match=r"Expected exactly one PCI bus in .*, got 2 instead"):
        find(trees, lambda devices: devices.pci("1e/0a"))


def test_of_scsi(trees: tuple[Path, Path]) -> None:
    plug(trees, "class/scsi_device/0:0:1:20/device", "sdb")
    plug(trees, "class/scsi_device/0:0:1:2/device", "sda")  # not by a part of another's address
    assert find(trees, lambda devices: devices.scsi("1:2")) == f"{trees[1]}/sda"
    assert (trees[0] / "class/scsi_host/host0/scan").read_text() == "0 1 2"


def test_of_pmem(trees: tuple[Path, Path]) -> None:
    late = lambda: (trees[1] / "pmem0").touch()  # noqa: E731
    assert find(trees, lambda devices: devices.pmem("/dev/pmem0"), later=late) == f"{trees[1]}/pmem0"


def test_of_a_mainframe(trees: tuple[Path, Path]) -> None:
    plug(trees, "bus/ccw/devices/0.0.0001/virtio1", "vda")
    assert find(trees, lambda devices: devices.ccw("0.0.0001")) == f"{trees[1]}/vda"


def test_missing_block_device_times_out(trees: tuple[Path, Path]) -> None:
    plug(trees, "devices/pci0000:00/0000:00:03.0/virtio3", "vdb")
    for address in ("02", "03/01"):
        with pytest.raises(Timeout, match=f"device {address}: did not appear within 0.3 s"):
            find(trees, lambda devices: devices.pci(address))  # noqa: B023


@pytest.mark.parametrize("path", ["", "2", "02/", "../02", "0g", "02/1", "/dev/vda"])
def test_no_address(trees: tuple[Path, Path], path: str) -> None:
    for how in (BlockDevices.pci, BlockDevices.scsi, BlockDevices.pmem, BlockDevices.ccw):
        with pytest.raises(InvalidArgument, match="invalid"):
            find(trees, lambda devices: how(devices, path))  # noqa: B023


def test_nodes(tmp_path: Path) -> None:
    devices = BlockDevices()
    assert devices.node("/dev/null") == "/dev/null"
    for path in (str(tmp_path), "/dev/no-such"):
        with pytest.raises(InvalidArgument, match=f"invalid device {path}"):
            devices.node(path)

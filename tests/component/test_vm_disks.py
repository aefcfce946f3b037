"""Test disks of a running VM: port, name, and removal."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caisson.image.vm.errors import NoEmptyPort, VMError
from caisson.image.vm.hotplug import disks
from caisson.image.vm.qmp import QMP
from tests.component.fake_qemu import monitor_of

pytestmark = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs QEMU")

PORTS = ("10", "11")


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Provide a machine with two ports and no guest: it never releases anything."""
    monkeypatch.setattr(disks, "PORTS", PORTS)
    words = ["qemu-system-x86_64", "-machine", "q35", "-m", "64M", "-nodefaults", "-display", "none", "-S"]
    for number, slot in enumerate(PORTS):
        words += ["-device", f"pcie-root-port,id=port{number},chassis={number + 1},addr={slot}"]
    with subprocess.Popen([*words, "-qmp", f"unix:{tmp_path / 'qmp.sock'},server=on,wait=off"]) as qemu:
        try:
            monitor_of(tmp_path / "qmp.sock").close()
            yield SimpleNamespace(directory=tmp_path, name="test")
        finally:
            qemu.kill()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "disk").write_bytes(bytes(4096))
    return tmp_path / "disk"


def plugged(vm: Any) -> dict[str, set[str]]:
    with QMP(vm.directory / "qmp.sock", 10) as monitor:
        return disks.plugged(monitor)


def test_each_port_takes_one_and_a_name_is_plugged_in_once(vm: Any, file: Path) -> None:
    assert plugged(vm) == {"port0": set(), "port1": set()}
    assert disks.plug_disk(vm, file, "one") == "10/00"
    assert disks.plug_disk(vm, file, "two") == "11/00"
    assert disks.plug_disk(vm, file, "one") == "10/00"
    with pytest.raises(VMError, match=": has 2 ports for disks and shares, and all are in use"):
        disks.plug_disk(vm, file, "three")
    assert plugged(vm) == {"port0": {"disk-one"}, "port1": {"disk-two"}}


def test_a_file_that_is_not_there_leaves_nothing(vm: Any, file: Path) -> None:
    with pytest.raises(VMError, match="No such file"):
        disks.plug_disk(vm, file.with_name("missing"), "one")
    assert disks.plug_disk(vm, file, "one") == "10/00"


def test_some_ports_are_left_empty(vm: Any, file: Path) -> None:
    assert disks.plug_disk(vm, file, "one", spare=1) == "10/00"
    with pytest.raises(NoEmptyPort, match=": has 2 ports for disks and shares, and all but 1, kept for others, are in"):
        disks.plug_disk(vm, file, "two", spare=1)
    assert disks.plug_disk(vm, file, "two") == "11/00"


def test_a_writable_file_is_written_by_one_vm_and_is_no_image_of_another_format(vm: Any, file: Path) -> None:
    header = b"QFI\xfb" + (3).to_bytes(4) + bytes(16) + (1 << 30).to_bytes(8)  # qcow2, of 1 GiB
    file.write_bytes(header.ljust(4096, b"\0"))
    disks.plug_disk(vm, file, "one", writable=True)
    with QMP(vm.directory / "qmp.sock", 10) as monitor:
        nodes = {node["node-name"]: node for node in monitor.execute("query-named-block-nodes")}
    node = nodes["disk-one"]
    assert (node["drv"], node["ro"], node["image"]["virtual-size"]) == ("raw", False, 4096)
    with pytest.raises(VMError, match="lock"):
        disks.plug_disk(vm, file, "two", writable=True)
    assert plugged(vm) == {"port0": {"disk-one"}, "port1": set()}


def test_unplug_says_whether_the_guest_has_released_a_disk(
    vm: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "UNPLUG_TIMEOUT", 0.2)
    disks.plug_disk(vm, file, "one", writable=True)
    assert not disks.unplug_disk(vm, "one"), "there is no guest to release it"
    assert plugged(vm) == {"port0": {"disk-one"}, "port1": set()}


def test_unplug_leaves_disks_of_others(vm: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "UNPLUG_TIMEOUT", 0.2)
    with QMP(vm.directory / "qmp.sock", 10) as monitor:
        monitor.execute("device_add", {"driver": "virtio-rng-pci", "id": "mine", "bus": "port0"})
    assert disks.plug_disk(vm, file, "one") == "11/00"
    asked: list[str] = []
    monkeypatch.setattr(QMP, "execute", _noting(asked, QMP.execute))
    disks.unplug_unused(vm, lambda: {"one"})
    assert "device_del" not in asked
    disks.unplug_unused(vm, set)  # the guest keeps it: we wait, but not forever
    assert asked.count("device_del") == 1
    assert plugged(vm) == {"port0": {"mine"}, "port1": {"disk-one"}}


def _noting(asked: list[str], execute: Any) -> Any:
    def noted(self: QMP, command: str, arguments: dict[str, Any] | None = None) -> Any:
        asked.append(command)
        return execute(self, command, arguments)

    return noted

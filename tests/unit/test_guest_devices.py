"""Test devices: the host's numbers are replaced with the guest's."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.base.errors import InvalidArgument, SystemCallFailed
from caisson.agent.guest import devices
from caisson.agent.guest.blockdevices import BlockDevices
from caisson.agent.guest.devices import GuestDevice
from caisson.agent.libcontainer.config.spec import Spec


def spec(*numbers: tuple[str, str, int, int], rules: list[dict[str, Any]] | None = None) -> Spec:
    nodes = [{"path": path, "type": kind, "major": major, "minor": minor} for path, kind, major, minor in numbers]
    return Spec.from_json({"linux": {"devices": nodes, "resources": {"devices": rules or []}}})


def assign_device_numbers(spec: Spec, *wanted: GuestDevice) -> Spec:
    return asyncio.run(devices.assign_device_numbers(spec, wanted, BlockDevices(0.1)))


def rule(kind: str, major: int, minor: int) -> dict[str, Any]:
    return {"allow": True, "type": kind, "major": major, "minor": minor, "access": "rw"}


def test_numbers_that_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first's number in the guest is the second's on the host; and c 8:0 is not b 8:0."""
    guest = {"/g/one": ("b", 8, 16), "/g/two": ("b", 8, 32)}
    monkeypatch.setattr(devices, "_numbers_of", guest.__getitem__)
    before = spec(
        ("/dev/one", "b", 8, 0), ("/dev/two", "b", 8, 16), ("/dev/other", "c", 8, 0),
        rules=[rule("b", 8, 0), rule("b", 8, 16), rule("c", 8, 0), {"allow": False, "access": "rwm"}],
    )  # fmt: skip
    wanted = [GuestDevice("", "mmioblk", f"/g/{name}", f"/dev/{name}") for name in ("one", "two")]
    linux = assign_device_numbers(before, *wanted).linux
    assert [(one.path, one.type, one.major, one.minor) for one in linux.devices] == [
        ("/dev/one", "b", 8, 16),
        ("/dev/two", "b", 8, 32),
        ("/dev/other", "c", 8, 0),
    ]
    assert linux.resources is not None
    found = [(one.type, one.major, one.minor) for one in linux.resources.devices]
    assert found == [("b", 8, 16), ("b", 8, 32), ("c", 8, 0), ("a", None, None)]


def test_a_real_node() -> None:
    found = assign_device_numbers(spec(("/dev/x", "c", 9, 9)), GuestDevice("", "blk", "/dev/null", "/dev/x"))
    assert (found.linux.devices[0].major, found.linux.devices[0].minor) == (1, 3)


@pytest.mark.parametrize(
    "device, error, text",
    [
        (GuestDevice("x", "", "", "/dev/x"), InvalidArgument, "invalid type for device x"),
        (GuestDevice("", "blk", "", "/dev/x"), InvalidArgument, "invalid ID and VM path for device /dev/x"),
        (GuestDevice("x", "blk", "", ""), InvalidArgument, "invalid container path for device x"),
        (GuestDevice("x", "vfio", "", "/dev/x"), InvalidArgument, 'Unknown device type "vfio"'),
        (GuestDevice("x", "mmioblk", "", "/dev/x"), InvalidArgument, "Invalid path for virtioMmioBlkDevice"),
        (
            GuestDevice("", "blk", "/dev/null", "/dev/y"),
            SystemCallFailed,
            "Should have found a matching device /dev/y in the spec",
        ),
        (
            GuestDevice("", "blk", "/dev/no-such", "/dev/x"),
            SystemCallFailed,
            "stat /dev/no-such: no such file or directory",
        ),
        (GuestDevice("", "blk", os.fspath(Path(__file__)), "/dev/x"), SystemCallFailed, "is not a device"),
    ],
)
def test_devices_reject_malformed_requests(device: GuestDevice, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        assign_device_numbers(spec(("/dev/x", "b", 1, 2)), device)


def test_a_configuration_without_devices() -> None:
    with pytest.raises(SystemCallFailed, match="No devices found from the spec, cannot update"):
        assign_device_numbers(spec(), GuestDevice("", "blk", "/dev/null", "/dev/x"))

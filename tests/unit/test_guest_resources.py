"""Test limits adapted to the guest: its CPUs, and its own disks."""

from __future__ import annotations

from pathlib import Path

import pytest

from caisson.agent.guest import resources as guest_resources
from caisson.agent.guest.rootdisk import root_disks
from caisson.agent.libcontainer.cgroups.cpuset import available, numbers
from caisson.agent.libcontainer.config.resources import DeviceRule, Resources


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", {0}), ("0-3", {0, 1, 2, 3}), ("7,0-1", {0, 1, 7}), ("", None), ("3-1", None), ("a", None), ("0-", None),
        ("-1", None), ("0,,1", None), ("٣", None), ("0-99999999999", None),
        ("0-9," * 2000 + "0", None),
    ],
)  # fmt: skip
def test_lists_of_cpus(text: str, expected: set[int] | None) -> None:
    assert numbers(text) == expected


@pytest.mark.parametrize(
    ("asked", "given"), [("0-3,4", "0-3"), ("0-3", "0-3"), ("1,2", "1,2"), ("9", "0-3"), ("x", "x"), ("", "")]
)
def test_cpus_that_are_not_there_become_all_that_are(tmp_path: Path, asked: str, given: str) -> None:
    online = tmp_path / "online"
    online.write_text("0-3\n")
    document = {"cpu": {"cpus": asked, "quota": 7}}
    assert available(Resources.from_json(document), str(online)).cpu.cpus == given


def disk(sysfs: Path, devices: Path, name: str, number: str, *, slaves: tuple[str, ...] = ()) -> Path:
    """Create a block device as sysfs shows it."""
    directory = devices / name
    (directory / "slaves").mkdir(parents=True)
    (directory / "dev").write_text(f"{number}\n")
    (sysfs / number).symlink_to(directory)
    for slave in slaves:
        (directory / "slaves" / slave.rpartition("/")[2]).symlink_to(devices / slave)
    return directory


def test_all_disks_below_a_root_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sysfs, devices = tmp_path / "dev", tmp_path / "devices"
    sysfs.mkdir()
    disk(sysfs, devices, "vda", "254:0")
    for name, number in (("vda/vda1", "254:1"), ("vda/vda2", "254:2")):
        (disk(sysfs, devices, name, number) / "partition").write_text("1\n")
    disk(sysfs, devices, "vdb", "254:16")
    disk(sysfs, devices, "dm-0", "253:0", slaves=("vda/vda1",))
    monkeypatch.setattr("os.stat", lambda path: type("S", (), {"st_dev": 253 << 8})())
    assert root_disks(sysfs=str(sysfs)) == ((253, 0), (254, 0), (254, 1), (254, 2))
    monkeypatch.setattr("os.stat", lambda path: type("S", (), {"st_dev": 0x2A})())
    assert root_disks(sysfs=str(sysfs)) == ()


def test_rules_end_in_a_ban_of_the_guests_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_resources, "root_disks", lambda: ((254, 0), (254, 1)))
    everything = DeviceRule(True, "a", None, None, "rwm")
    fitted = guest_resources.fit(Resources(devices=(everything,)))
    assert fitted.devices == (
        everything, DeviceRule(False, "b", 254, 0, "rw"), DeviceRule(False, "b", 254, 1, "rw"),
    )  # fmt: skip
    assert guest_resources.fit(Resources()).devices == ()

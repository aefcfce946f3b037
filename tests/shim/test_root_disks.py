"""Test roots in image files: the guest mounts them from disks if it can, and from the share otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.rpc.ttrpc.responses import RpcError
from caisson.agent.shim.bundle import TaskBundle
from tests.shim.fake_containerd import FakeContainerd, Fifo, Task
from tests.shim.native_machines import DISKS
from tests.support.poll import until

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

MIB = 1 << 20


@pytest.fixture
def image(fake: FakeContainerd) -> Path:
    """Return a root file system as the blockfile snapshotter makes them."""
    return make_image(fake, "root.img")


def make_image(fake: FakeContainerd, name: str) -> Path:
    file = fake.place / name
    with file.open("wb") as stream:
        stream.truncate(32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-d", fake.rootfs, file], check=True)
    return file


def read(file: Path, path: str) -> str:
    """Return a file in an image, which must be clean: unmounted, not just synchronized."""
    subprocess.run(["e2fsck", "-fn", file], check=True, capture_output=True)
    return subprocess.run(["debugfs", "-R", f"cat {path}", file], check=True, capture_output=True, text=True).stdout


def loop_devices(file: Path) -> list[str]:
    """Return the loop devices of a file: those on this host are the native machine's disks, too."""
    found = subprocess.run(["losetup", "--noheadings", "--output", "NAME", "--associated", file], capture_output=True)
    return found.stdout.decode().split()


async def run(fake: FakeContainerd, name: str, image: Path, script: str, *options: str) -> tuple[bytes, str, bool]:
    """Run a script in a root to its end; return its output, the shim's log, and whether the host had mounted it."""
    task = await fake.start(name, "sh", "-c", script)
    stdout = Fifo(fake.place / f"{name}.out", os.O_RDONLY)
    await task.create(("ext4", str(image), ["loop", *options]), stdout=stdout.path)
    mounted = is_mounted(task)
    await task.call("Start")
    await task.call("Wait")
    printed = await stdout.read()
    stdout.close()
    await task.call("Delete")
    await task.call("Shutdown")
    await fake.delete_program(task)
    return printed, (task.bundle / "log").read_text(), mounted


def is_mounted(task: Task) -> bool:
    return str(task.bundle / "rootfs") in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize(
    ("disks", "mounted", "reason"), [(None, True, ""), ("0", True, "all ports are in use"), ("1", False, "")]
)
async def test_what_is_written_to_a_root_is_in_its_file_whoever_mounts_it(
    fake: FakeContainerd, image: Path, disks: str | None, mounted: bool, reason: str
) -> None:
    if disks is not None:
        fake.environment[DISKS] = disks
    found = await run(fake, "c1", image, "echo kept > /kept; cat /kept; grep -c ' / ext4 rw' /proc/mounts", "rw")
    assert (found[0], found[2]) == (b"kept\n1\n", mounted)
    assert reason in found[1] and ("not a disk" in found[1]) == bool(reason)
    if mounted:  # the host unmounts lazily
        await until(lambda: loop_devices(image) == [], "the end of the mount")
    assert loop_devices(image) == [] and read(image, "/kept") == "kept\n"
    again = await run(fake, "c2", image, "cat /kept; touch /x || echo unchanged", "ro")
    assert (again[0], again[2]) == (b"kept\nunchanged\n", mounted)


@pytest.fixture
def mounted(image: Path, tmp_path: Path) -> Iterator[Path]:
    """Mount the image on the host."""
    subprocess.run(["mount", "-o", "loop", image, tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


async def test_a_file_that_the_host_uses_is_no_disk(fake: FakeContainerd, image: Path, mounted: Path) -> None:
    fake.environment[DISKS] = "1"
    printed, log, by_host = await run(fake, "c1", image, "echo kept > /kept; cat /kept", "rw")
    assert (printed, by_host) == (b"kept\n", True)
    assert "is in use on the host, by a loop device" in log
    assert (mounted / "kept").read_text() == "kept\n", "they must share one file system"


async def test_a_disk_is_unplugged_while_its_pod_goes_on(fake: FakeContainerd, image: Path) -> None:
    fake.environment[DISKS] = "1"
    of_pod: dict[str, Any] = {"annotations": {"io.kubernetes.cri.sandbox-id": "p1"}}
    first = await fake.run("p1", "sleep", "1000", **of_pod)
    failed = await fake.start("failed", "nosuch", **of_pod)
    with pytest.raises(RpcError, match="executable file not found"):
        await failed.create(("ext4", str(image), ["loop", "rw"]))
        await failed.call("Start")
    if fake.topics("failed"):
        await failed.call("Delete")
    await fake.delete_program(failed)
    assert loop_devices(image) == []
    second = await fake.start("second", "sh", "-c", "echo kept > /kept", **of_pod)
    await second.create(("ext4", str(image), ["loop", "rw"]))
    assert len(loop_devices(image)) == 1
    await second.call("Start")
    await second.call("Wait")
    await second.call("Delete")
    assert loop_devices(image) == [] and read(image, "/kept") == "kept\n"
    await fake.delete_program(second)
    await first.end()


async def test_a_file_that_cannot_be_mounted_fails_and_leaves_nothing(fake: FakeContainerd, image: Path) -> None:
    fake.environment[DISKS] = "1"
    image.write_bytes(bytes(MIB))
    task = await fake.start("c1", "true")
    with pytest.raises(RpcError, match="Could not mount /dev/loop"):
        await task.create(("ext4", str(image), ["loop", "rw"]))
    await task.call("Shutdown")
    await fake.delete_program(task)
    assert loop_devices(image) == []


async def test_a_killed_shim_leaves_no_disk(fake: FakeContainerd, image: Path) -> None:
    fake.environment[DISKS] = "1"
    task = await fake.start("c1", "sleep", "1000")
    await task.create(("ext4", str(image), ["loop", "rw"]))
    await task.call("Start")
    record = TaskBundle(task.bundle, "c1").read()
    assert record is not None and loop_devices(image) != []
    os.kill(record.shim.pid, signal.SIGKILL)
    await fake.delete_program(task)
    await until(lambda: loop_devices(image) == [], "the disk's end")
    Path(task.address.removeprefix("unix://")).unlink()

"""Test roots in image files: the guest mounts them from disks if it can, and from the share otherwise."""

from __future__ import annotations

import asyncio
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

Mount = tuple[str, str, list[str]]


@pytest.fixture
def image(fake: FakeContainerd) -> Path:
    """Return a root file system as the blockfile snapshotter makes them."""
    return make_image(fake, "root.img", fake.rootfs)


def make_image(fake: FakeContainerd, name: str, directory: Path) -> Path:
    """Make a file system of a directory's files."""
    file = fake.place / name
    with file.open("wb") as stream:
        stream.truncate(32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-d", directory, file], check=True)
    return file


def read(file: Path, path: str) -> str:
    """Return a file in an image, which must be clean: unmounted, not just synchronized."""
    subprocess.run(["e2fsck", "-fn", file], check=True, capture_output=True)
    return subprocess.run(["debugfs", "-R", f"cat {path}", file], check=True, capture_output=True, text=True).stdout


def loop_devices(file: Path) -> list[str]:
    """Return the loop devices of a file: those on this host are the native machine's disks, too."""
    found = subprocess.run(["losetup", "--noheadings", "--output", "NAME", "--associated", file], capture_output=True)
    return found.stdout.decode().split()


async def run(fake: FakeContainerd, name: str, script: str, *mounts: Mount) -> tuple[bytes, str, bool]:
    """Run a script in a root to its end; return its output, the shim's log, and whether the host had mounted it."""
    task = await fake.start(name, "sh", "-c", script)
    stdout = Fifo(fake.place / f"{name}.out", os.O_RDONLY)
    await task.create(*mounts, stdout=stdout.path)
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
    script = "echo kept > /kept; cat /kept; grep -c ' / ext4 rw' /proc/mounts"
    found = await run(fake, "c1", script, ("ext4", str(image), ["loop", "rw"]))
    assert (found[0], found[2]) == (b"kept\n1\n", mounted)
    assert reason in found[1] and ("not a disk" in found[1]) == bool(reason)
    if mounted:  # the host unmounts lazily
        await until(lambda: loop_devices(image) == [], "the end of the mount")
    assert loop_devices(image) == [] and read(image, "/kept") == "kept\n"
    again = await run(fake, "c2", "cat /kept; touch /x || echo unchanged", ("ext4", str(image), ["loop", "ro"]))
    assert (again[0], again[2]) == (b"kept\nunchanged\n", mounted)


@pytest.fixture
def mounted(image: Path, tmp_path: Path) -> Iterator[Path]:
    """Mount the image on the host."""
    subprocess.run(["mount", "-o", "loop", image, tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


async def test_a_file_that_the_host_uses_is_no_disk(fake: FakeContainerd, image: Path, mounted: Path) -> None:
    fake.environment[DISKS] = "1"
    printed, log, by_host = await run(fake, "c1", "echo kept > /kept; cat /kept", ("ext4", str(image), ["loop", "rw"]))
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


def erofs(fake: FakeContainerd, tmp_path: Path) -> list[Mount]:
    """Return an image of two layers as mounts of the erofs snapshotter."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/motd").write_text("of the upper layer")
    for name, directory in (("lower", fake.rootfs), ("upper", tmp_path)):
        subprocess.run(["mkfs.erofs", "--quiet", fake.place / name, directory], check=True, capture_output=True)
    return [("erofs", str(fake.place / name), ["ro", "loop"]) for name in ("upper", "lower")]


SCRIPT = "cat /etc/motd; echo kept > /etc/kept; rm /etc/passwd; ls /etc; grep -c ' / overlay rw' /proc/mounts"


@pytest.mark.parametrize(("disks", "mounted"), [(None, True), ("2", True), ("3", False)])
async def test_erofs_layers_are_a_root_whoever_mounts_them(
    fake: FakeContainerd, tmp_path: Path, disks: str | None, mounted: bool
) -> None:
    if disks is not None:
        fake.environment[DISKS] = disks
    lower = await asyncio.to_thread(erofs, fake, tmp_path)
    file = await asyncio.to_thread(make_image, fake, "rwlayer.img", tmp_path)
    overlay = ("format/mkdir/overlay", "overlay", [
        "X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
        "workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper", "lowerdir={{ overlay 1 2 }}",
    ])  # fmt: skip
    found = await run(fake, "c1", SCRIPT, ("ext4", str(file), ["rw", "loop"]), *lower, overlay)
    assert (found[0], found[2]) == (b"of the upper layerkept\nmotd\n1\n", mounted)
    assert ("ports" in found[1]) == (disks == "2")
    await until(lambda: loop_devices(file) == [], "the end of the mount")
    assert read(file, "/upper/etc/kept") == "kept\n"


async def test_erofs_layers_below_a_directory_are_mounted_by_the_host(fake: FakeContainerd, tmp_path: Path) -> None:
    fake.environment[DISKS] = "9"
    lower = await asyncio.to_thread(erofs, fake, tmp_path)
    for name in ("fs", "work"):
        (fake.place / name).mkdir()
    overlay = ("format/mkdir/overlay", "overlay", [
        f"workdir={fake.place}/work", f"upperdir={fake.place}/fs", "lowerdir={{ overlay 0 1 }}"
    ])  # fmt: skip
    found = await run(fake, "c1", SCRIPT, *lower, overlay)
    assert (found[0], found[2]) == (b"of the upper layerkept\nmotd\n1\n", True)
    assert (fake.place / "fs/etc/kept").read_text() == "kept\n"
    view = await run(fake, "c2", "cat /etc/passwd | wc -l; touch /x || echo unchanged", lower[1])
    assert (view[0][-10:], view[2]) == (b"unchanged\n", False)


async def test_links_in_a_file_system_lead_to_no_directory_of_the_host(fake: FakeContainerd, tmp_path: Path) -> None:
    lower = await asyncio.to_thread(erofs, fake, tmp_path)
    (tmp_path / "upper").symlink_to(fake.place)
    file = await asyncio.to_thread(make_image, fake, "rwlayer.img", tmp_path)
    overlay = ("format/mkdir/overlay", "overlay", [
        "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
        "workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper", "lowerdir={{ mount 1 }}",
    ])  # fmt: skip
    task = await fake.start("c1", "true")
    with pytest.raises(RpcError, match="layers/0/upper: is a symbolic link"):
        await task.create(("ext4", str(file), ["rw", "loop"]), lower[1], overlay)
    await task.call("Shutdown")
    await fake.delete_program(task)

"""Test storages of a Kata 3.x host that need no disk: overlays, tmpfs, directories, watched ones; and their owners."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.client import Client, Stub
from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata3 import agent_pb2, oci_pb2, types_pb2
from tests.native.agent_support import RunningAgent
from tests.native.kata3_support import SHARED, Host, apart, inside, mounts, refused
from tests.support.poll import until

__all__ = ["apart"]

pytestmark = pytest.mark.root
SANDBOX = "/run/kata-containers/sandbox"


def storage(driver: str, mount_point: str, **fields: Any) -> agent_pb2.Storage:
    return agent_pb2.Storage(driver=driver, mount_point=mount_point, **fields)


def shm(*options: str) -> agent_pb2.Storage:
    return storage("ephemeral", f"{SANDBOX}/shm", source="shm", fstype="tmpfs", options=options)


async def sandbox(host: Host, *storages: agent_pb2.Storage) -> None:
    await host.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(sandbox_id="pod", storages=storages))


async def test_shared_memory_has_its_size_and_can_be_resized(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        await sandbox(host, shm("noexec", "nosuid", "nodev", "mode=1777", "size=65536k"))
        place = f"{SANDBOX}/shm"
        assert os.statvfs(inside(apart, place)).f_blocks * 4096 == 64 << 20
        assert "noexec" in mounts(apart, place)[0]
        bind = oci_pb2.Mount(destination="/shm", type="bind", source=place, options=["rbind"])
        (apart.rootfs / "shm").mkdir(exist_ok=True)
        await host.run("c", host.spec(mounts=[bind]))
        await host.sh("c", "echo kept > /shm/file")
        update = agent_pb2.UpdateEphemeralMountsRequest(storages=[shm("remount", "size=131072k")])
        await host.rpc.UpdateEphemeralMounts(update)
        assert os.statvfs(inside(apart, place)).f_blocks * 4096 == 128 << 20
        assert await host.sh("c", "cat /shm/file") == "kept\n"
        update = agent_pb2.UpdateEphemeralMountsRequest(storages=[storage("local", "/run/x")])
        assert "Unsupported storage type" in (await refused(host.rpc.UpdateEphemeralMounts(update)))[1]


async def test_volumes_of_a_group(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        await sandbox(host)
        place = f"{SANDBOX}/ephemeral"
        memory = storage("ephemeral", f"{place}/m", source="tmpfs", fstype="tmpfs", options=["fsgid=1234"])
        plain = storage("local", f"{place}/d", source="local", fstype="local", options=["mode=0770", "fsgid=77"])
        await host.create("c", storages=[memory, plain])
        for name, gid, mode in (("m", 1234, 0o3777), ("d", 77, 0o2770)):
            status = inside(apart, f"{place}/{name}").stat()
            assert (status.st_gid, oct(stat.S_IMODE(status.st_mode) | 0o1000)) == (gid, oct(mode | 0o1000))
        for bad in ("fsgid=x", "fsgid=-1"):
            wrong = storage("local", f"{place}/e", source="local", fstype="local", options=[bad])
            assert (await refused(host.create("d", storages=[wrong])))[0] == StatusCode.INVALID_ARGUMENT


async def test_a_volume_is_given_to_a_group_without_following_links(apart: RunningAgent) -> None:
    place = f"{SHARED}/volume"

    async with await Host.connect(apart) as host:
        await sandbox(host)
        source = inside(apart, "/run/kata-containers/source")
        (source / "a/b").mkdir(parents=True)
        (source / "a/b/file").write_text("x")
        (source / "a/b/file").chmod(0o600)
        (source / "link").symlink_to("/run/kata-containers/victim")
        victim = inside(apart, "/run/kata-containers/victim")
        victim.write_text("x")
        victim.chmod(0o600)
        volume = storage("blk", place, source="/run/kata-containers/source", fstype="bind", options=["bind"])
        volume.fs_group.CopyFrom(agent_pb2.FSGroup(group_id=99, group_change_policy=types_pb2.Always))
        await host.create("c", storages=[volume])
        root = inside(apart, place)
        assert [stat.S_IMODE((root / name).stat().st_mode) for name in ("", "a/b", "a/b/file")] == [
            0o2775, 0o2775, 0o660,
        ]  # fmt: skip
        assert {(root / name).stat().st_gid for name in ("", "a", "a/b", "a/b/file")} == {99}
        assert (stat.S_IMODE(victim.stat().st_mode), victim.stat().st_gid) == (0o600, 0)
        await host.remove("c")
        (source / "a/b/file").chmod(0o600)
        volume.fs_group.group_change_policy = types_pb2.OnRootMismatch
        await host.create("c", storages=[volume])  # the root is already correct: nothing is changed
        assert stat.S_IMODE((root / "a/b/file").stat().st_mode) == 0o600


async def test_a_mount_point_is_counted_across_containers(apart: RunningAgent) -> None:
    place = f"{SHARED}/layer"

    async with await Host.connect(apart) as host:
        await sandbox(host)
        layer = storage("mmioblk", place, source="tmpfs", fstype="tmpfs")
        lasting = storage("mmioblk", f"{place}-shared", source="tmpfs", fstype="tmpfs", shared=True)
        for name in ("one", "two"):
            await host.create(name, storages=[layer, lasting])
            assert len(mounts(apart, place)) == 1
        await host.remove("one")
        assert len(mounts(apart, place)) == 1
        await host.remove("two")
        assert mounts(apart, place) == []
        assert len(mounts(apart, f"{place}-shared")) == 1  # until the sandbox ends
        await host.create("one", storages=[layer, lasting])
        assert len(mounts(apart, place)) == 1


async def test_only_shares_are_mounted_outside_of_containers(apart: RunningAgent) -> None:
    client = await Client.connect(apart.socket)
    async with client:
        guest = Stub(client, caisson_pb2.DESCRIPTOR.services_by_name["Guest"])
        request = caisson_pb2.MountRequest(source="x", fstype="tmpfs", mount_point=SHARED)
        code, text = await refused(guest.Mount(request))
        assert code == StatusCode.INVALID_ARGUMENT and "virtiofs or 9p" in text
        assert mounts(apart, SHARED) == []


async def test_a_failed_create_gives_its_mounts_back(apart: RunningAgent) -> None:
    place = f"{SHARED}/layer"

    async with await Host.connect(apart) as host:
        await sandbox(host)
        layer = storage("mmioblk", place, source="tmpfs", fstype="tmpfs")
        await host.create("one", storages=[layer])
        wrong = storage("mmioblk", f"{SHARED}/x", source="tmpfs", fstype="no-such-fs")
        await refused(host.create("two", storages=[layer, wrong]))
        assert len(mounts(apart, place)) == 1
        await host.remove("one")
        assert mounts(apart, place) == []


async def test_an_overlay_is_the_root_and_its_changes_go_with_the_container(apart: RunningAgent) -> None:
    root = "/run/kata-containers/c/rootfs"

    async with await Host.connect(apart) as host:
        await sandbox(host)
        layer = storage(
            "overlayfs",
            root,
            source="none",
            fstype="overlay",
            options=[f"lowerdir={apart.rootfs}", "io.katacontainers.fs-opt.overlay-rw", "io.katacontainers.x=y"],
        )
        await host.run("c", host.spec(root=root, readonly=False), storages=[layer])
        await host.sh("c", "echo changed > /new")
        assert (inside(apart, "/run/kata-containers/c/upper/new")).read_text() == "changed\n"
        assert not (apart.rootfs / "new").exists()
        await host.remove("c")
        assert mounts(apart, root) == []
        assert not inside(apart, "/run/kata-containers/c/upper").exists()


async def test_an_overlay_with_directories_that_are_made_for_it(apart: RunningAgent) -> None:
    base = "/run/kata-containers/rw"
    made = [f"io.katacontainers.volume.overlayfs.create_directory={base}/{name}" for name in ("upper", "work")]

    async with await Host.connect(apart) as host:
        await sandbox(host)
        layer = storage(
            "overlayfs",
            "/run/kata-containers/c/rootfs",
            source="overlay",
            fstype="overlay",
            options=[f"lowerdir={apart.rootfs}", f"upperdir={base}/upper", f"workdir={base}/work"],
            driver_options=made,
        )
        await host.run("c", host.spec(root="/run/kata-containers/c/rootfs", readonly=False), storages=[layer])
        assert await host.sh("c", "echo x > /new; cat /new") == "x\n"


async def test_a_watched_directory_follows_the_hosts(apart: RunningAgent) -> None:
    source, target = f"{SHARED}/config", f"{SHARED}/watchable/config"

    async with await Host.connect(apart) as host:
        await sandbox(host)
        real = inside(apart, source)
        (real / "..1").mkdir(parents=True)
        (real / "..1/key").write_text("one")
        (real / "..data").symlink_to("..1")
        (real / "key").symlink_to("..data/key")
        watched = storage("watchable-bind", target, source=source, fstype="bind", options=["bind"])
        bind = oci_pb2.Mount(destination="/config", type="bind", source=target, options=["rbind", "ro"])
        (apart.rootfs / "config").mkdir(exist_ok=True)
        await host.run("c", host.spec(mounts=[bind]), storages=[watched])
        assert await host.sh("c", "cat /config/key") == "one"
        (real / "..2").mkdir()
        (real / "..2/key").write_text("two")
        (real / "..next").symlink_to("..2")
        (real / "..next").rename(real / "..data")  # as Kubernetes does
        (real / "..1/key").unlink()
        (real / "..1").rmdir()
        copied = inside(apart, target)
        await until(lambda: (copied / "key").read_text() == "two" and not (copied / "..1").exists(), "the change")
        assert await host.sh("c", "cat /config/key") == "two"
        (real / "large").write_bytes(bytes(2 << 20))  # larger than the limit for copies: bind-mounted from now on
        await until(lambda: mounts(apart, target) != [], "the bind mount")
        await host.remove("c")
        assert mounts(apart, target) == [] and not copied.exists()
        assert (real / "large").exists()


async def test_a_large_directory_is_bound_and_a_single_file_copied(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        await sandbox(host)
        real = inside(apart, f"{SHARED}/many")
        real.mkdir(parents=True)
        for number in range(40):
            (real / str(number)).write_text("x")
        inside(apart, f"{SHARED}/one").write_text("alone")
        many = storage("watchable-bind", f"{SHARED}/watchable/many", source=f"{SHARED}/many", fstype="bind")
        one = storage("watchable-bind", f"{SHARED}/watchable/one", source=f"{SHARED}/one", fstype="bind")
        inside(apart, f"{SHARED}/empty").mkdir()
        empty = storage("watchable-bind", f"{SHARED}/watchable/empty", source=f"{SHARED}/empty", fstype="bind")
        await host.create("c", storages=[many, one, empty])
        assert list(inside(apart, f"{SHARED}/watchable/empty").iterdir()) == []
        assert len(mounts(apart, f"{SHARED}/watchable/many")) == 1
        assert inside(apart, f"{SHARED}/watchable/one").read_text() == "alone"
        await host.remove("c")
        assert [path.name for path in inside(apart, f"{SHARED}/watchable").iterdir()] in ([], ["many"])
        assert len(list(real.iterdir())) == 40


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        (
            {"driver": "image_guest_pull", "source": "pause", "fstype": "overlay"},
            (StatusCode.INTERNAL, "Failed to find the storage handler image_guest_pull"),
        ),
        (
            {"driver": "blk", "source": "02/01", "fstype": "ext4"},
            (StatusCode.DEADLINE_EXCEEDED, "device 02/01: did not appear within 0.1 s"),
        ),
        (
            {"driver": "blk", "source": "/dev/null", "fstype": "ext4", "driver_options": ["encryption_key=x"]},
            (StatusCode.UNIMPLEMENTED, "storage /run/kata-containers/s: encrypted volumes are not supported"),
        ),
        (
            {"driver": "erofs.multi-layer", "source": "01", "fstype": "erofs", "options": ["X-kata.overlay-lower"]},
            (StatusCode.INVALID_ARGUMENT, "storage /run/kata-containers/s: a root of layers needs one writable"),
        ),
    ],
    ids=["guest pull", "no disk", "encrypted", "no writable layer"],
)
async def test_storage_reports_why_a_mount_failed(
    apart: RunningAgent, wanted: dict[str, Any], answer: tuple[StatusCode, str]
) -> None:
    async with await Host.connect(apart) as host:
        await sandbox(host)
        one = storage(mount_point="/run/kata-containers/s", **wanted)
        code, text = await refused(host.create("c", storages=[one]))
        assert (code, text.startswith(answer[1])) == (answer[0], True), text


async def test_the_shared_directory_may_be_mounted_already(apart: RunningAgent) -> None:
    async with await Host.connect(apart) as host:
        first = storage("mmioblk", SHARED, source="tmpfs", fstype="tmpfs")
        await sandbox(host, first)
        share = storage("virtio-fs", f"{SHARED}/", source="kataShared", fstype="virtiofs")
        await host.create("c", storages=[share])
        assert len(mounts(apart, SHARED)) == 1
        await host.remove("c")
        assert len(mounts(apart, SHARED)) == 1


@pytest.fixture
def loop_devices(tmp_path: Path, busybox_rootfs: Path) -> Iterator[tuple[str, str]]:
    """Provide two disks: an ext4 to write to, and an erofs of the busybox root."""
    writable, layer = tmp_path / "writable", tmp_path / "layer"
    with writable.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", writable], check=True)
    subprocess.run(["mkfs.erofs", "--quiet", layer, busybox_rootfs], check=True)
    devices = []
    try:
        for image in (writable, layer):
            done = subprocess.run(["losetup", "--show", "-f", image], check=True, capture_output=True, text=True)
            devices.append(done.stdout.strip())
        yield devices[0], devices[1]
    finally:
        for device in devices:
            subprocess.run(["losetup", "-d", device], check=True)


async def test_a_root_of_several_disks(apart: RunningAgent, loop_devices: tuple[str, str]) -> None:
    root = "/run/kata-containers/c/rootfs"
    writable, layer = loop_devices
    upper = storage("erofs.multi-layer", root, source=writable, fstype="ext4", options=["X-kata.overlay-upper"])
    lower = storage("erofs.multi-layer", root, source=layer, fstype="erofs", options=["X-kata.overlay-lower", "ro"])
    async with await Host.connect(apart) as host:
        await sandbox(host)
        await host.run("c", host.spec(root=root, readonly=False), storages=[upper, lower])
        assert await host.sh("c", "echo changed > /new; cat /new; ls /bin/sh") == "changed\n/bin/sh\n"
        assert len(mounts(apart, root)) == 1
        await host.remove("c")
        assert mounts(apart, root) == []
        assert not [line for line in Path(f"/proc/{apart.pid}/mountinfo").read_text().splitlines() if "/loop" in line]
        assert not inside(apart, "/run/kata-containers/c/multi-layer").exists()


async def test_a_disk_is_mounted_and_given_to_a_group(apart: RunningAgent, loop_devices: tuple[str, str]) -> None:
    place = f"{SHARED}/volume"
    volume = storage("blk", place, source=loop_devices[0], fstype="ext4", options=["nosuid"])
    volume.fs_group.CopyFrom(agent_pb2.FSGroup(group_id=42))
    async with await Host.connect(apart) as host:
        await sandbox(host)
        await host.create("c", storages=[volume])
        assert "nosuid" in mounts(apart, place)[0]
        assert inside(apart, f"{place}/lost+found").stat().st_gid == 42
        await host.remove("c")
        assert mounts(apart, place) == []

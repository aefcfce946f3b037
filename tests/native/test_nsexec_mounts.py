"""Test unusual mounts: dangling links, inaccessible sources, mapped owners, remounts, a second proc."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.base.syscalls import umount2
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.process.launch import Stdio
from tests.native.nsexec_support import Box, config

pytestmark = pytest.mark.root

MAPS = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
OTHER = [{"containerID": 0, "hostID": 5000, "size": 1000}]


def with_mount(destination: str, source: Path | str = "", *options: str, **more: Any) -> dict[str, Any]:
    value = config()
    value["mounts"].append(
        {"destination": destination, "type": "bind", "source": str(source), "options": ["bind", *options], **more}
    )
    return value


def in_userns(value: dict[str, Any]) -> dict[str, Any]:
    """Without sysfs, which requires a network namespace with the same owner, and without a fixed group for devpts."""
    value["linux"]["namespaces"].append({"type": "user"})
    value["linux"] |= {"uidMappings": MAPS, "gidMappings": MAPS}
    return value


@pytest.fixture
def source(box: Box) -> Path:
    """Provide one of the runtime's directories, containing a file."""
    path = box.path / "source"
    path.mkdir()
    (path / "file").write_text("content\n")
    return path


@pytest.fixture
def mounted(box: Box) -> Iterator[Path]:
    """Mount a small file system with flags of its own."""
    path = box.path / "mounted"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nosuid,nodev,noexec,size=64k", "tmpfs", path], check=True)
    (path / "file").write_text("content\n")
    yield path
    umount2(str(path), 2)


@pytest.mark.parametrize(
    ("links", "target", "made"),
    [
        ({"data": "/var/data"}, "/data", "var/data"),
        ({"data": "var/lib/data"}, "/data", "var/lib/data"),
        ({"data": "../../../../escape"}, "/data", "escape"),
        ({"var/data": "../srv/data"}, "/var/data", "srv/data"),
        ({"data": "/one", "one": "two"}, "/data", "two"),
        ({"data": "/var/data"}, "/data/below/it", "var/data/below/it"),
    ],
    ids=["absolute", "relative", "upwards", "sideways", "chain", "middle"],
)
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_target_that_is_a_dangling_link_is_made_where_it_leads(
    box: Box, source: Path, links: dict[str, str], target: str, made: str, kind: str
) -> None:
    for name, to in links.items():
        (box.rootfs / name).symlink_to(to)
    value = with_mount(target, source if kind == "directory" else source / "file")
    script = f"cat /{made}{'/file' if kind == 'directory' else ''} {target}{'/file' if kind == 'directory' else ''}"
    assert box.sh(script, value) == "content\ncontent\n"
    found = box.rootfs / made
    assert found.is_dir() if kind == "directory" else found.is_file()
    assert not (box.path / "escape").exists()


@pytest.mark.parametrize("to", ["loop", "missing/../elsewhere", "x" * 300])
async def test_a_link_without_an_end_is_an_error(box: Box, source: Path, to: str) -> None:
    (box.rootfs / "loop").symlink_to(to)
    with pytest.raises(LaunchError, match="mount target /loop"):
        await box.output(with_mount("/loop", source))


@pytest.mark.parametrize("kind", ["directory", "file"])
async def test_a_file_and_a_directory_cannot_be_mounted_on_each_other(box: Box, source: Path, kind: str) -> None:
    target, from_ = ("/etc", source / "file") if kind == "file" else ("/etc/passwd", source)
    with pytest.raises(LaunchError, match=f"^mount target {target}: .*not a directory") as caught:
        await box.output(with_mount(target, from_))  # docker looks for "is a directory", too, of programs
    assert "is a directory" not in str(caught.value)


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_source_that_the_root_of_a_user_namespace_cannot_reach(box: Box, source: Path, kind: str) -> None:
    source.chmod(0o755)
    (source / "file").chmod(0o644)
    box.path.joinpath("private").mkdir(mode=0o700)
    source = source.rename(box.path / "private/source")
    value = in_userns(with_mount("/mnt", source if kind == "directory" else source / "file"))
    if kind == "file":
        value["mounts"][-1]["destination"] = "/mnt/file"
        (box.rootfs / "mnt/file").touch()  # the directory does not belong to the mapped root
    assert box.sh("cat /mnt/file", value) == "content\n"


def test_what_is_mounted_in_such_a_container_stays_in_it(box: Box, mounted: Path) -> None:
    subprocess.run(["mount", "--make-shared", mounted], check=True)
    (mounted / "below").mkdir()
    mounted.chmod(0o777)
    value = in_userns(with_mount("/mnt", mounted, "rshared"))
    capabilities = ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]
    value["process"]["capabilities"] = {name: capabilities for name in ("bounding", "effective", "permitted")}
    box.sh("mount -t tmpfs inside /mnt/below && grep inside /proc/mounts >/dev/null", value)
    assert "inside" not in Path("/proc/self/mounts").read_text()


def test_pipes_belong_to_the_mapped_root(box: Box) -> None:
    value = in_userns(config("sh", "-c", "echo out > /dev/stdout; echo err > /dev/stderr; cat /dev/stdin"))

    async def work() -> tuple[int, bytes, bytes]:
        ends = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
        os.write(ends[0][1], b"in\n")
        os.close(ends[0][1])
        try:
            launched = await box.create(value, stdio=Stdio(ends[0][0], ends[1][1], ends[2][1]))
            await box.start(launched)
            status = await launched.child.wait()
            os.close(ends[1][1])
            os.close(ends[2][1])
            return status, os.read(ends[1][0], 100), os.read(ends[2][0], 100)
        finally:
            for fd in (ends[0][0], ends[1][0], ends[2][0]):
                os.close(fd)

    assert box.run(work()) == (0, b"out\nin\n", b"err\n")


def owned(path: Path, uid: int) -> Path:
    os.chown(path, uid, uid)
    return path


@pytest.mark.parametrize("userns", [False, True])
def test_id_mapped_mounts(box: Box, mounted: Path, userns: bool) -> None:
    """On disk 0 and 7; shown as 5000 and 5007, or in the container's own user namespace as 0 and 7."""
    owned(mounted / "file", 7)
    value = with_mount("/mnt", mounted, "idmap", **({} if userns else {"uidMappings": OTHER, "gidMappings": OTHER}))
    expected = "0 7\n" if userns else "5000 5007\n"
    out = box.sh("echo $(stat -c %u /mnt /mnt/file)", in_userns(value) if userns else value)
    assert out == expected
    assert (mounted / "file").stat().st_uid == 7


def test_mappings_imply_idmap(box: Box, mounted: Path) -> None:
    value = with_mount("/mnt", mounted, uidMappings=OTHER, gidMappings=OTHER)
    assert box.sh("stat -c '%u %g' /mnt", value) == "5000 5000\n"


@pytest.mark.parametrize(("option", "expected"), [("idmap", "5000 0\n"), ("ridmap", "5000 5000\n")])
def test_the_mounts_below_are_mapped_only_with_ridmap(box: Box, mounted: Path, option: str, expected: str) -> None:
    below = mounted / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", below], check=True)
    try:
        value = with_mount("/mnt", mounted, "rbind", option, uidMappings=OTHER, gidMappings=OTHER)
        assert box.sh("echo $(stat -c %u /mnt /mnt/below)", value) == expected
    finally:
        umount2(str(below), 2)


def test_writes_through_an_id_mapped_mount_have_the_owner_on_disk(box: Box, mounted: Path) -> None:
    mounted.chmod(0o700)
    value = with_mount("/mnt", mounted, "idmap", uidMappings=OTHER, gidMappings=OTHER)
    value["process"]["user"] = {"uid": 5000, "gid": 5000}
    box.sh("echo x > /mnt/written", value)
    assert ((mounted / "written").stat().st_uid, (mounted / "written").stat().st_gid) == (0, 0)


def test_id_mapped_mounts_of_what_an_earlier_mount_has_put_there(box: Box, mounted: Path) -> None:
    """Only stage 2 has it in its mount namespace, and only the runtime may map it."""
    owned(mounted / "file", 7)
    (box.rootfs / "again").mkdir()
    value = in_userns(with_mount("/mnt", mounted))
    value["mounts"] += [
        {"destination": "/again", "type": "bind", "source": str(box.rootfs / "mnt"), "options": ["rbind", "idmap"]},
        {"destination": "/mnt", "type": "bind", "source": str(box.rootfs / "again"), "options": ["rbind", "ro"]},
    ]
    assert box.sh("echo $(stat -c %u /again/file /mnt/file)", value) == "7 7\n"


async def test_idmap_by_the_user_namespace_that_is_joined(box: Box, mounted: Path) -> None:
    owned(mounted / "file", 7)

    other = await box.running(in_userns(config("sleep", "1000")))
    value = with_mount("/mnt", mounted, "idmap")
    value["process"]["args"] = ["stat", "-c", "%u", "/mnt/file"]
    value["linux"]["namespaces"] += [{"type": "user", "path": f"/proc/{other.child.pid}/ns/user"}]
    value["mounts"] = [mount for mount in value["mounts"] if mount["destination"] != "/sys"]
    box.fifo = box.path / "second.fifo"
    assert (await box.output(value)) == (0, "7\n", "")


async def test_idmap_needs_mappings(box: Box, source: Path) -> None:
    with pytest.raises(SpecError, match=r"mounts\[4\]\.options: idmap needs"):
        await box.output(with_mount("/mnt", source, "idmap"))


def flags(box: Box, value: dict[str, Any], target: str = "/mnt") -> set[str]:
    return set(box.sh(f"grep ' {target} ' /proc/self/mounts | tail -n1 | cut -d' ' -f4", value).strip().split(","))


HELD = {"ro", "nosuid", "nodev", "noexec", "nosymfollow", "noatime"}


@pytest.mark.parametrize("userns", [False, True])
@pytest.mark.parametrize(
    ("source", "options", "expected", "in_a_userns"),
    [
        ("ro,noexec,nosymfollow,noatime", "", "ro,noexec,nosymfollow,noatime", "ro,noexec,nosymfollow,noatime"),
        ("ro,noexec,nosymfollow", "dev", "", "ro,noexec"),
        ("ro,noexec,nosymfollow", "remount,nosuid", "nosuid", "ro,noexec,nosuid"),
        ("ro", "nosuid,nodev,rprivate", "nosuid,nodev", "ro,nosuid,nodev"),
        ("ro", "rw,nosuid", "nosuid", None),
        ("nosuid,nodev,noexec,noatime", "ro", "ro,noatime", "ro,nosuid,nodev,noexec,noatime"),
        ("nosuid,noatime", "dev,suid,exec,atime", "noatime", None),
        ("nosymfollow,nodev", "ro,symfollow", "ro", "ro,nodev"),
        ("noatime", "relatime", "", None),
        ("noatime", "norelatime", "noatime", "noatime"),
        ("noatime", "nodiratime", "", None),
        ("noatime", "noatime,ro", "noatime,ro", "noatime,ro"),
        ("relatime", "strictatime", "", None),
    ],
)
def test_flags_of_bind_mounts_as_runc_has_them(
    box: Box, mounted: Path, source: str, options: str, expected: str, in_a_userns: str | None, userns: bool
) -> None:
    """No flags: those of the source.  Otherwise others are cleared, except locked ones and access times."""
    subprocess.run(["mount", "--bind", "-o", f"remount,suid,dev,exec,{source}", mounted, mounted], check=True)
    value = with_mount("/mnt", mounted, *filter(None, options.split(",")))
    if not userns:
        assert flags(box, value) & HELD == set(filter(None, expected.split(",")))
    elif in_a_userns is not None:
        assert flags(box, in_userns(value)) & HELD == set(filter(None, in_a_userns.split(",")))
    else:
        with pytest.raises(LaunchError, match="error mounting /mnt: operation not permitted"):
            box.run(box.output(in_userns(value)))


def test_remount_changes_the_mount_that_is_there(box: Box) -> None:
    value = config()
    value["mounts"].append({"destination": "/dev", "type": "tmpfs", "source": "x", "options": ["remount", "size=128k"]})
    found = flags(box, value, "/dev")
    assert "size=128k" in found and "nosuid" not in found


async def test_unknown_options_are_the_file_systems_to_refuse(box: Box) -> None:
    value = config()
    value["mounts"].append({"destination": "/mnt", "type": "tmpfs", "source": "x", "options": ["colour=green"]})
    with pytest.raises(LaunchError, match=r"error mounting /mnt: tmpfs: Unknown parameter 'colour'"):
        await box.output(value)


def test_a_second_proc_over_proc(box: Box) -> None:
    value = config()
    value["mounts"].append({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]})
    assert box.sh("grep -c ' /proc ' /proc/self/mounts; cat /proc/sys/kernel/hostname; ls /proc/keys", value)
    del value["linux"]["readonlyPaths"]
    masked = box.sh("cat /proc/timer_list | wc -c; grep -c ' /proc ' /proc/self/mounts", value)
    assert masked == "0\n2\n"


def test_a_procfs_can_be_bound_over_proc_and_nothing_else(box: Box, source: Path) -> None:
    value = config("sh", "-c", "ls -d /proc/1")
    value["mounts"].append({"destination": "/proc", "type": "bind", "source": "/proc", "options": ["rbind"]})
    assert box.run(box.output(value))[:2] == (0, "/proc/1\n")
    for bad in (str(source), "/proc/sys", "/sys"):
        value["mounts"][-1]["source"] = bad
        with pytest.raises(LaunchError, match="error mounting /proc: only a procfs can be mounted there"):
            box.run(box.output(value))


def test_modes_of_made_targets(box: Box, source: Path) -> None:
    (box.rootfs / "data").symlink_to("var/data")
    box.sh("true", with_mount("/data", source))
    assert stat.S_IMODE((box.rootfs / "var/data").stat().st_mode) == 0o755


def test_without_pivot_root_the_root_is_moved(box: Box, source: Path) -> None:
    value = with_mount("/mnt", source)
    value["root"]["readonly"] = True
    script = "cat /mnt/file; cd /; cd ..; ls -d bin; touch /x 2>&1; cut -d' ' -f5 /proc/self/mountinfo"
    lines = box.sh(f"{script}; true", value, pivot=False).splitlines()
    assert lines[:3] == ["content", "bin", "touch: /x: Read-only file system"]
    assert "/mnt" in lines and not [line for line in lines if "caisson" in line]


@pytest.mark.parametrize("pivot", [True, False])
def test_no_user_namespace_gets_a_procfs_without_masks(box: Box, pivot: bool) -> None:
    value = config()
    more = ["CAP_SETFCAP", "CAP_SETUID", "CAP_SETGID"]
    for name in ("bounding", "effective", "permitted"):
        value["process"]["capabilities"][name] = [*value["process"]["capabilities"][name], *more]
    script = "unshare -mrpf sh -c 'mount -t proc none /proc && echo mounted' 2>&1; true"
    assert "mounted" not in (out := box.sh(script, value, pivot=pivot)) and "ermission denied" in out, out

"""Test images, mounts and configurations that try to reach the guest: tables of known runtime CVEs, as a black box."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.errors import LaunchError
from tests.native.nsexec_support import (
    CAPABILITIES,
    Box,
    children,
    config,
)

pytestmark = pytest.mark.root


@pytest.fixture
def canary(box: Box) -> Path:
    """Provide a directory outside the root that must not change."""
    path = box.path / "canary"
    path.mkdir()
    (path / "ptmx").write_text("decoy")
    return path


def _untouched(canary: Path) -> bool:
    return [p.name for p in canary.iterdir()] == ["ptmx"] and (canary / "ptmx").read_text() == "decoy"


def _refused(box: Box, value: dict[str, Any], match: str, error: type[Exception] = LaunchError) -> None:
    with pytest.raises(error, match=match):
        box.run(box.create(value))
    assert children() == []


@pytest.mark.parametrize("link", ["{canary}", "../canary", "/../../../../{canary}"])
def test_mount_targets_behind_links_stay_inside(box: Box, canary: Path, link: str) -> None:  # CVE-2015-3629, 2019-18837
    (box.rootfs / "vol").symlink_to(link.format(canary=canary))
    # The link's target, inside: the mount point is created there.
    inside = box.rootfs / (str(canary).lstrip("/") if "{" in link else "canary")
    inside.mkdir(parents=True)
    value = config()
    value["mounts"].append({"destination": "/vol/deep/x", "type": "tmpfs", "source": "tmpfs"})
    assert "/deep/x tmpfs" in box.sh("cat /proc/mounts", value)
    assert (inside / "deep" / "x").is_dir()
    assert _untouched(canary)


def test_a_dangling_link_is_followed_inside_the_root_alone(box: Box, canary: Path) -> None:
    (box.rootfs / "vol").symlink_to(canary / "new")
    value = config()
    value["mounts"].append({"destination": "/vol", "type": "tmpfs", "source": "tmpfs"})
    assert f" {canary}/new " in box.sh("cat /proc/self/mounts", value)
    assert _untouched(canary)


@pytest.mark.parametrize("name", ["proc", "sys"])
def test_proc_and_sys_must_be_ordinary_directories(box: Box, name: str) -> None:  # CVE-2019-19921, 2023-27561
    (box.rootfs / name).rmdir()
    (box.rootfs / f"bad-{name}").mkdir()
    (box.rootfs / name).symlink_to(f"bad-{name}")
    _refused(box, config(), f"error mounting /{name}: must be mounted on ordinary directory")


@pytest.mark.parametrize("target", ["/proc/self", "/proc/sys", "/proc/self/attr", "/proc/../proc/1", "/proc/no-such"])
def test_nothing_can_be_mounted_inside_proc(box: Box, target: str) -> None:  # CVE-2019-16884
    value = config()
    value["mounts"].append({"destination": target, "type": "tmpfs", "source": "tmpfs"})
    _refused(box, value, "inside /proc", SpecError)


def test_nor_by_way_of_a_link(box: Box) -> None:  # CVE-2025-52881
    (box.rootfs / "vol").symlink_to("/proc/sys")
    value = config()
    value["mounts"].append({"destination": "/vol", "type": "tmpfs", "source": "tmpfs"})
    _refused(box, value, "mount target /vol: is inside procfs")


def test_only_procfs_on_proc(box: Box) -> None:
    value = config()
    value["mounts"][0] = {"destination": "/proc", "type": "tmpfs", "source": "tmpfs"}
    _refused(box, value, "only a proc filesystem", SpecError)


@pytest.mark.parametrize("target", ["/", "/.", "/bin/.."])
def test_nothing_on_the_root(box: Box, target: str) -> None:
    value = config()
    value["mounts"].append({"destination": target, "type": "tmpfs", "source": "tmpfs"})
    _refused(box, value, "must not be the container's root", SpecError)


def test_nothing_on_the_root_by_way_of_a_link(box: Box) -> None:
    (box.rootfs / "vol").symlink_to("/")
    value = config()
    value["mounts"].append({"destination": "/vol", "type": "tmpfs", "source": "tmpfs"})
    _refused(box, value, "is the container's root")


@pytest.mark.parametrize(
    "cwd", [*(f"/proc/self/fd/{n}" for n in range(12)), "/proc/1/cwd", "/proc/self/cwd", "/proc/self/fd/7/../.."]
)
async def test_cwd_cannot_lead_out(box: Box, cwd: str) -> None:  # CVE-2024-21626
    with pytest.raises(LaunchError, match=r"working directory|chdir to cwd"):
        await box.create(config(cwd=cwd))


async def test_cwd_of_an_exec_cannot_lead_out(box: Box) -> None:
    init = await box.running()
    for number in range(12):
        with pytest.raises(LaunchError, match=r"working directory|chdir to cwd"):
            await box.exec(init, {"args": ["pwd"], "cwd": f"/proc/self/fd/{number}"})


def test_programs_by_descriptor_do_not_exist(box: Box) -> None:
    for number in range(3, 12):
        _refused(box, config(f"/proc/self/fd/{number}"), r'exec: "/proc/self/fd/\d+": ')


def test_the_runtime_cannot_be_overwritten(box: Box, nsexec_path: Path) -> None:  # CVE-2019-5736
    before = nsexec_path.read_bytes()
    (box.rootfs / "evil").write_text("#!/proc/self/exe\n")
    (box.rootfs / "evil").chmod(0o755)
    for program in ("/proc/self/exe", "/evil"):
        status, out, err = box.run(box.output(config(program)))
        assert (status, out) == (1, "")
        assert "does nothing by itself" in err
    assert nsexec_path.read_bytes() == before
    assert box.sh("echo fine") == "fine\n"


@pytest.mark.parametrize("link", ["{canary}", "../canary"])
async def test_dev_that_is_a_link(box: Box, canary: Path, link: str) -> None:  # CVE-2026-41579, 2026-47766
    (box.rootfs / "dev").rmdir()
    (box.rootfs / "dev").symlink_to(link.format(canary=canary))
    value = config()
    value["mounts"] = [mount for mount in value["mounts"] if not mount["destination"].startswith("/dev")]
    with pytest.raises(LaunchError):
        await box.create(value)
    assert _untouched(canary)


@pytest.mark.parametrize("kind", ["link", "file", "zero"])
async def test_masks_need_the_real_null_device(box: Box, kind: str) -> None:  # CVE-2025-31133
    dev = box.path / "dev"
    (dev / "pts").mkdir(parents=True)
    if kind == "link":
        (dev / "null").symlink_to("/proc/sys/kernel/core_pattern")
    elif kind == "file":
        (dev / "null").write_text("")
    else:
        os.mknod(dev / "null", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    value = config()
    value["mounts"][1] = {"destination": "/dev", "type": "bind", "source": str(dev), "options": ["rbind"]}
    with box.stdio() as (stdio, _, _), pytest.raises(LaunchError, match="not the null device"):
        await box.create(value, stdio=stdio)


@pytest.mark.parametrize("case", ["plain", "ptmx", "console"])
def test_terminals_need_real_devices(box: Box, canary: Path, case: str) -> None:  # CVE-2025-52565
    dev = box.path / "dev"
    (dev / "pts").mkdir(parents=True)
    os.mknod(dev / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    value = config(terminal=True)
    value["mounts"][1] = {"destination": "/dev", "type": "bind", "source": str(dev), "options": ["rbind"]}
    if case == "console":
        (dev / "console").symlink_to(canary / "ptmx")
    else:
        del value["mounts"][2]  # no devpts on /dev/pts
    if case == "ptmx":
        os.mknod(dev / "pts" / "ptmx", stat.S_IFCHR | 0o666, os.makedev(5, 2))
    _refused(box, value, "console /dev/")
    assert _untouched(canary)


def test_a_device_is_not_made_over_something_else(box: Box, canary: Path) -> None:
    (box.rootfs / "dev" / "zero").symlink_to(canary / "ptmx")
    value = config()
    value["mounts"] = [mount for mount in value["mounts"] if not mount["destination"].startswith("/dev")]
    _refused(box, value, "device /dev/zero: exists and is not this device")
    assert _untouched(canary)


async def test_sysctl_goes_to_the_real_procfs(box: Box) -> None:  # CVE-2025-52881
    # The image's /proc is never mounted on, and looks like a procfs; the private descriptor is unaffected.
    (box.rootfs / "proc" / "sys" / "net" / "ipv4").mkdir(parents=True)
    (box.rootfs / "proc" / "sys" / "net" / "ipv4" / "ip_forward").write_text("trap")
    value = config("true")
    value["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1"}
    value["linux"]["maskedPaths"] = value["linux"]["readonlyPaths"] = []
    del value["mounts"][0]
    assert (await box.output(value))[0] == 0
    assert (box.rootfs / "proc" / "sys" / "net" / "ipv4" / "ip_forward").read_text() == "trap"


async def test_exec_inherits_no_capabilities(box: Box) -> None:  # CVE-2022-29162, 2022-27650, 2022-24769
    init = await box.running()
    own = {name: ["CAP_KILL"] for name in ("bounding", "effective", "permitted")}
    assert [
        line.split()[1]
        for line in (
            await box.exec(init, {"args": ["grep", "-E", "Cap(Inh|Amb)", "/proc/self/status"], "capabilities": own})
        )[1].splitlines()
    ] == ["0" * 16, "0" * 16]


async def test_created_container_holds_no_descriptor_of_the_guest(box: Box) -> None:  # CVE-2016-9962
    """Its descriptors, root and directory, as seen by another process in its pid namespace with all privileges."""

    launched = await box.create(config("sleep", "1000"))
    proc = Path(f"/proc/{launched.child.pid}")
    assert (proc / "cwd" / "bin" / "busybox").samefile(box.rootfs / "bin" / "busybox")
    assert (proc / "root" / "bin" / "busybox").samefile(box.rootfs / "bin" / "busybox")
    links = [str(link.readlink()) for link in (proc / "fd").iterdir()]
    kinds = sorted({link.split(":")[0] for link in links})
    # Its own null device, the fifo itself, the sync socket, and a procfs with subset=pid that has no path.
    assert kinds == ["/", "/dev/null", str(box.fifo), "socket"]
    assert len(links) == 6


def test_users_that_are_neither_names_nor_ids_are_refused(box: Box) -> None:  # CVE-2026-30892, 2024-40635
    from caisson.agent.libcontainer.config.process import Process

    (box.rootfs / "etc").mkdir(exist_ok=True)
    names = ("+0", "0x3e8", "1000abc", "4294967296", "-1", "nobody")
    (box.rootfs / "etc/passwd").write_text("".join(f"{name}:x:0:0::/:/bin/sh\n" for name in names[:-1]))
    for name in names:
        with pytest.raises(SpecError, match=r"process\.user\.username"):
            box.run(box.output(config("id", user={"username": name})))
    for uid in (-1, 1 << 32, (1 << 32) - 1, "0", 1.5, True):
        with pytest.raises(SpecError):
            Process.from_json({"args": ["id"], "user": {"uid": uid}})


def test_capabilities_that_one_does_not_have_are_refused(box: Box) -> None:
    value = config()
    value["process"]["capabilities"] = {"bounding": CAPABILITIES, "effective": ["CAP_KILL"], "permitted": []}
    _refused(box, value, "capabilities effective, permitted, inheritable")

"""Test config.json fields that no other test covers: each is set, and checked from inside (docs/oci.md)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.libcontainer.cgroups import Cgroup, CgroupError, HierarchyV2
from caisson.agent.libcontainer.config.resources import Resources
from caisson.agent.libcontainer.errors import LaunchError
from tests.native.agent_support import RunningAgent
from tests.native.nsexec_support import CAPABILITIES, Box, config
from tests.support.unique import unique

pytestmark = pytest.mark.root
THROTTLES = {"ReadBps": "rbps", "WriteBps": "wbps", "ReadIOPS": "riops", "WriteIOPS": "wiops"}


def test_environment_has_no_duplicates_and_a_home(box: Box) -> None:
    value = config(env=["PATH=/bin", "A=first", "B=x=y", "A=last", "HOME=/elsewhere"])
    value["process"]["args"] = ["env"]
    assert box.run(box.output(value)) == (0, "PATH=/bin\nA=last\nB=x=y\nHOME=/elsewhere\n", "")
    assert box.sh("echo $HOME") == "/root\n"


async def test_args_and_cwd(box: Box) -> None:
    value = config("sh", "-c", 'pwd; for a; do echo "<$a>"; done', "name", "a b", "", "*", cwd="/made/by/us")
    assert (await box.output(value)) == (0, "/made/by/us\n<a b>\n<>\n<*>\n", "")


@pytest.mark.parametrize("score", [0, 700, 1000])
def test_oom_score_adj(box: Box, score: int) -> None:
    assert box.sh("cat /proc/self/oom_score_adj", config(oomScoreAdj=score)) == f"{score}\n"


def test_domainname(box: Box) -> None:
    assert box.sh("cat /proc/sys/kernel/domainname; hostname", config() | {"domainname": "example.org"}).split() == [
        "example.org", "box",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ("ro,nosuid,nodev,noexec", {"ro", "nosuid", "nodev", "noexec", "relatime"}),
        ("ro,nosuid,nodev,noexec,rw,suid,dev,exec", {"rw", "relatime"}),
        ("noatime,nodiratime,nosymfollow", {"rw", "noatime", "nodiratime", "nosymfollow"}),
        ("noatime,nodiratime,nosymfollow,atime,diratime,symfollow", {"rw", "relatime"}),
        ("strictatime", {"rw"}),
        ("strictatime,nostrictatime", {"rw", "relatime"}),
        ("strictatime,relatime", {"rw", "relatime"}),
        ("noatime,norelatime", {"rw", "relatime"}),  # the kernel has no other default
        ("defaults", {"rw", "relatime"}),
    ],
)
def test_attributes_of_a_mount(box: Box, kind: str, options: str, flags: set[str]) -> None:
    (box.path / "source").mkdir()
    with mounted(box.path / "source"):
        value = config()
        value["mounts"].append({"destination": "/mnt", "type": kind, "source": "source", "options": options.split(",")})
        assert attributes(box.sh("cat /proc/self/mountinfo", value), "/mnt") == flags


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ("rro,rnosuid,rnodev,rnoexec", {"ro", "nosuid", "nodev", "noexec", "relatime"}),
        ("rro,rnosuid,rnodev,rnoexec,rrw,rsuid,rdev,rexec", {"rw", "relatime"}),
        ("rnoatime,rnodiratime,rnosymfollow", {"rw", "noatime", "nodiratime", "nosymfollow"}),
        ("rnoatime,rnodiratime,rnosymfollow,ratime,rdiratime,rsymfollow", {"rw", "relatime"}),
        ("rstrictatime", {"rw"}),
        ("rstrictatime,rnostrictatime", {"rw", "relatime"}),
        ("rstrictatime,rrelatime", {"rw", "relatime"}),
        ("rnoatime,rnorelatime", {"rw", "relatime"}),
    ],
)
def test_recursive_attributes_of_a_mount(box: Box, options: str, flags: set[str]) -> None:
    source = box.path / "source"
    source.mkdir()
    with mounted(source):
        (source / "sub").mkdir()
        with mounted(source / "sub"):
            value = config()
            mount = {"destination": "/mnt", "type": "bind", "source": str(source)}
            value["mounts"].append(mount | {"options": ["rbind", *options.split(",")]})
            seen = box.sh("cat /proc/self/mountinfo", value)
            assert attributes(seen, "/mnt") == attributes(seen, "/mnt/sub") == flags
            value["mounts"][-1] = mount | {"options": ["rbind", "ro"]}
            seen = box.sh("cat /proc/self/mountinfo", value)
            assert "ro" in attributes(seen, "/mnt") and "rw" in attributes(seen, "/mnt/sub")


def test_bind_takes_one_mount_and_rbind_all_below(box: Box) -> None:
    source = box.path / "source"
    source.mkdir()
    with mounted(source):
        (source / "sub").mkdir()
        with mounted(source / "sub"):
            value = config()
            for option in ("bind", "rbind"):
                value["mounts"].append(
                    {"destination": f"/{option}", "type": "none", "source": str(source), "options": [option]}
                )
            seen = box.sh("cat /proc/self/mountinfo", value)
    points = {line.split()[4] for line in seen.splitlines()}
    assert points >= {"/bind", "/rbind", "/rbind/sub"} and "/bind/sub" not in points


@pytest.mark.parametrize("recursive", ["", "r"])
@pytest.mark.parametrize(
    ("option", "tags"),
    [("private", set()), ("slave", {"master"}), ("shared", {"master", "shared"}), ("unbindable", {"unbindable"})],
)
def test_propagation_of_a_mount(box: Box, recursive: str, option: str, tags: set[str]) -> None:
    source = box.path / "source"
    source.mkdir()
    with mounted(source):
        (source / "sub").mkdir()
        with mounted(source / "sub"):
            value = config()
            value["mounts"].append(
                {"destination": "/mnt", "type": "bind", "source": str(source), "options": ["rbind", recursive + option]}
            )
            seen = box.sh("cat /proc/self/mountinfo", value)
    assert propagation(seen, "/mnt") == tags
    assert propagation(seen, "/mnt/sub") == (tags if recursive else {"master"})


@pytest.mark.parametrize("option", ["private", "slave", "shared", "unbindable"])
def test_propagation_of_the_root(box: Box, option: str) -> None:
    value = config()
    value["linux"]["rootfsPropagation"] = option
    assert ("shared" in propagation(box.sh("cat /proc/self/mountinfo", value), "/")) is (option == "shared")
    assert ("unbindable" in propagation(box.sh("cat /proc/self/mountinfo", value), "/")) is (option == "unbindable")


def test_options_that_are_the_filesystems(box: Box) -> None:
    value = config()
    options = ["size=64k", "mode=1750", "uid=7", "gid=8", "sync", "dirsync", "lazytime", "mand"]
    value["mounts"].append({"destination": "/mnt", "type": "tmpfs", "source": "name-of-it", "options": options})
    stat, mount = box.sh("stat -c '%a %u:%g' /mnt; grep ' /mnt ' /proc/self/mountinfo", value).splitlines()
    assert stat == "1750 7:8"
    source, superblock = mount.split(" - tmpfs ")[1].split()
    assert source == "name-of-it"
    assert {"size=64k", "sync", "dirsync", "lazytime", "mand"} <= set(superblock.split(","))


@pytest.mark.parametrize("option", ["async", "nolazytime", "nomand"])
def test_options_that_take_back_a_flag_of_the_filesystem(box: Box, option: str) -> None:
    value = config()
    options = ["sync", "lazytime", "mand", option]
    value["mounts"].append({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": options})
    superblock = box.sh("grep ' /mnt ' /proc/self/mountinfo", value).split()[-1].split(",")
    gone = {"async": "sync", "nolazytime": "lazytime", "nomand": "mand"}[option]
    assert {"sync", "lazytime", "mand"} - set(superblock) == {gone}


@pytest.mark.parametrize("option", ["iversion", "noiversion", "silent", "loud", "acl"])
def test_mount_options_without_effect_are_ignored(box: Box, option: str) -> None:
    value = config()
    value["mounts"].append({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": [option]})
    assert "tmpfs" in box.sh("grep ' /mnt ' /proc/self/mountinfo", value)


@pytest.mark.parametrize("option", ["no-such-option"])
async def test_options_that_the_filesystem_does_not_know(box: Box, option: str) -> None:
    value = config()
    value["mounts"].append({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": [option]})
    with pytest.raises(LaunchError, match=f"error mounting /mnt: tmpfs: Unknown parameter '{option}'"):
        await box.create(value)


def test_types_of_mounts(box: Box) -> None:
    value = config()
    value["mounts"] += [
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["mode=1777"]},
    ]
    mounts = dict(line.split()[1:3] for line in box.sh("cat /proc/mounts", value).splitlines())
    wanted = {"/proc": "proc", "/sys": "sysfs", "/dev/pts": "devpts", "/dev/mqueue": "mqueue", "/dev/shm": "tmpfs"}
    assert {point: mounts.get(point) for point in wanted} == wanted


def test_clocks_that_are_ahead(box: Box) -> None:
    value = config()
    value["linux"]["namespaces"].append({"type": "time"})
    value["linux"]["timeOffsets"] = {"monotonic": {"secs": 86400, "nanosecs": 7}, "boottime": {"secs": 604800}}
    lines = [line.split() for line in box.sh("cat /proc/self/timens_offsets", value).splitlines()]
    assert lines == [["monotonic", "86400", "7"], ["boottime", "604800", "0"]]


def test_several_id_maps(box: Box) -> None:
    value = config(user={"uid": 1000, "gid": 1000})
    value["linux"]["namespaces"].append({"type": "user"})
    value["linux"]["maskedPaths"] = []
    for kind in ("uidMappings", "gidMappings"):
        value["linux"][kind] = [
            {"containerID": 0, "hostID": 100000, "size": 1000}, {"containerID": 1000, "hostID": 300000, "size": 1},
        ]  # fmt: skip
    out = box.sh("id -u; cat /proc/self/uid_map; cat /proc/self/gid_map", value).split()
    assert out == ["1000", *(["0", "100000", "1000", "1000", "300000", "1"] * 2)]


@pytest.mark.parametrize(("allow", "opened"), [(True, ["r"]), (False, [])])
async def test_device_rules_on_the_cgroup(box: Box, allow: bool, opened: list[str]) -> None:
    device = {"type": "c", "major": 1, "minor": 11, "access": "r"}  # /dev/kmsg
    rules = [{"allow": not allow, "access": "rwm"}, {"allow": allow, **device}]
    value = config("sh", "-c", "(: 3<>/mnt/kmsg) && echo rw; (: 3</mnt/kmsg) && echo r; true")
    value["process"]["capabilities"] = {
        name: [*CAPABILITIES, "CAP_SYSLOG"] for name in ("bounding", "effective", "permitted")
    }
    value["linux"]["devices"] = [{"path": "/mnt/kmsg", "type": "c", "major": 1, "minor": 11}]
    value["linux"]["resources"] = {"devices": rules}
    async with own_cgroup(value["linux"]["resources"]) as cgroup:
        status, out, err = await box.output(value, cgroup=cgroup)
    assert (status, out.split()) == (0, opened), err
    assert "Operation not permitted" in err


async def test_unified_values_reach_the_cgroup() -> None:
    async with own_cgroup({}) as cgroup:
        present = [name for name in ("memory.high", "pids.max", "hugetlb.2MB.max") if Path(cgroup.path, name).exists()]
        assert present, "this machine's cgroup v2 hierarchy has no controller with a limit"
        value = {name: "4194304" for name in present}
        cgroup.apply(Resources.from_json({"unified": value}))
        assert {name: Path(cgroup.path, name).read_text().strip() for name in present} == value


def test_every_new_namespace_is_another(box: Box) -> None:
    kinds = {"ipc": "ipc", "mount": "mnt", "network": "net", "pid": "pid", "uts": "uts", "cgroup": "cgroup"}
    value = config()
    value["linux"]["namespaces"] = [{"type": kind} for kind in kinds]
    inside = box.sh("for n in ipc mnt net pid uts cgroup; do readlink /proc/self/ns/$n; done", value).split()
    outside = [str(Path("/proc/self/ns", name).readlink()) for name in kinds.values()]
    assert len(inside) == len(kinds) and not set(inside) & set(outside)


async def test_joins_a_namespace_whose_path_the_configuration_gives(box: Box) -> None:
    first = await box.running()
    value = config("hostname")
    value["hostname"] = ""
    value["linux"]["namespaces"] = [
        {"type": "pid"}, {"type": "mount"}, {"type": "uts", "path": f"/proc/{first.child.pid}/ns/uts"},
    ]  # fmt: skip
    assert (await box.output(value)) == (0, "box\n", "")


@pytest.mark.parametrize(
    ("limit", "file", "value"),
    [
        ({"memory": {"limit": 67108864}}, "memory.max", "67108864"),
        ({"memory": {"reservation": 33554432}}, "memory.low", "33554432"),
        ({"memory": {"limit": 67108864, "swap": 100663296}}, "memory.swap.max", "33554432"),
        ({"cpu": {"shares": 1024}}, "cpu.weight", "100"),
        ({"cpu": {"quota": 20000, "period": 40000}}, "cpu.max", "20000 40000"),
        ({"cpu": {"quota": 20000, "period": 40000, "burst": 10000}}, "cpu.max.burst", "10000"),
        ({"cpu": {"idle": 1}}, "cpu.idle", "1"),
        ({"cpu": {"cpus": "0"}}, "cpuset.cpus", "0"),
        ({"cpu": {"mems": "0"}}, "cpuset.mems", "0"),
        ({"pids": {"limit": 77}}, "pids.max", "77"),
        ({"hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}]}, "hugetlb.2MB.max", "4194304"),
        ({"hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}]}, "hugetlb.2MB.rsvd.max", "4194304"),
        *(
            (
                {"blockIO": {f"throttle{kind}Device": [{"major": 1, "minor": 0, "rate": 1048576}]}},
                "io.max",
                " ".join(["1:0", *(f"{name}={1048576 if name == key else 'max'}" for name in THROTTLES.values())]),
            )
            for kind, key in THROTTLES.items()
        ),
    ],
)
async def test_limits_reach_the_cgroup_or_name_the_controller(limit: dict[str, Any], file: str, value: str) -> None:
    async with own_cgroup({}) as cgroup:
        if Path(cgroup.path, file).exists():
            cgroup.apply(Resources.from_json(limit))
            assert Path(cgroup.path, file).read_text().strip() == value
        else:
            controller = file.partition(".")[0]
            with pytest.raises(CgroupError, match=f"controller '{controller}' is not available here"):
                cgroup.apply(Resources.from_json(limit))


def test_cgroups_around_the_last_container_go_with_it(box: Box) -> None:
    hierarchy = HierarchyV2.find()
    assert hierarchy is not None
    around = Path(hierarchy.root, unique("caisson-around"))
    one, two = (hierarchy.create(f"{around.name}/deep/{name}") for name in ("one", "two"))
    box.run(one.delete())
    assert [path.name for path in (around / "deep").iterdir() if path.is_dir()] == ["two"]
    box.run(two.delete())
    assert not around.exists()
    around.mkdir()  # not ours: it stays
    try:
        box.run(hierarchy.create(f"{around.name}/one").delete())
        assert around.exists()
    finally:
        around.rmdir()


async def test_annotations_are_kept_and_the_cgroup_is_where_it_was_asked_for(agent: RunningAgent) -> None:
    name = unique("caisson-fields")

    async with agent.connect() as client:
        await client.create_sandbox()
        spec = agent.spec()
        spec.Annotations["org.example/key"] = "a value=1"
        spec.Linux.CgroupsPath = f"/{name}"
        container = await client.create_container("box", spec)
        (file,) = agent.state.rglob("state.json")
        state = json.loads(file.read_text())
        assert "org.example/key=a value=1" in json.dumps(state)
        groups = Path(f"/proc/{state['init_process_pid']}/cgroup").read_text()
        assert f"0::/{agent.cgroup_parent}/{name}\n" in groups
        await container.remove()


@contextmanager
def mounted(path: Path) -> Iterator[None]:
    """Mount a shared tmpfs on this machine."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
    try:
        subprocess.run(["mount", "--make-shared", path], check=True)
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@asynccontextmanager
async def own_cgroup(resources: dict[str, Any]) -> AsyncIterator[Cgroup]:
    """Create a cgroup with these limits."""
    hierarchy = HierarchyV2.find()
    assert hierarchy is not None, "this machine has no cgroup v2 hierarchy"
    cgroup = hierarchy.create(unique("caisson-fields"))
    try:
        cgroup.apply(Resources.from_json(resources))
        yield cgroup
    finally:
        await cgroup.delete()


def _mount(mountinfo: str, point: str) -> list[str]:
    return next(fields for line in mountinfo.splitlines() if (fields := line.split())[4] == point)


def attributes(mountinfo: str, point: str) -> set[str]:
    """Return a mount's attributes (proc_pid_mountinfo(5), field 6)."""
    return set(_mount(mountinfo, point)[5].split(","))


def propagation(mountinfo: str, point: str) -> set[str]:
    """Return a mount's optional fields without their numbers."""
    fields = _mount(mountinfo, point)
    return {field.partition(":")[0] for field in fields[6 : fields.index("-")]}

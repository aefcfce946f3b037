"""Test cgroup v1: the controllers that this machine has, and an agent that uses them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.client import Agent
from caisson.agent.libcontainer.cgroups import CgroupError, files
from caisson.agent.libcontainer.cgroups.v1.cgroup import CgroupV1, HierarchyV1
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.resources import Resources
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.kata1 import agent_pb2, oci_pb2
from tests.native.agent_support import RunningAgent, refused, sh
from tests.native.nsexec_support import Box, children, config
from tests.support.unique import unique

pytestmark = pytest.mark.root
with_v1 = pytest.mark.parametrize("agent", ["v1"], indirect=True)
MEBIBYTE = 1 << 20
DISK = f"{os.major(Path('/').stat().st_dev)}:{os.minor(Path('/').stat().st_dev)}"
MAJOR, MINOR = map(int, DISK.split(":"))


@pytest.fixture
def hierarchies() -> HierarchyV1:
    found = HierarchyV1.find(unique("caisson-v1"))
    assert found is not None, "this machine has no cgroup v1 hierarchies"
    return found


@pytest.fixture
def cgroup(hierarchies: HierarchyV1) -> Iterator[CgroupV1]:
    made = hierarchies.create("test")
    yield made
    asyncio.run(made.kill())
    asyncio.run(made.delete())
    for root in hierarchies.roots.values():
        assert not Path(root, unique("caisson-v1")).exists()


def content(cgroup: CgroupV1, file: str) -> str:
    path = cgroup.file(file)
    assert path is not None
    return Path(path).read_text().strip()


def put_in(cgroup: CgroupV1, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
    """Put a process in all of the cgroup's hierarchies."""

    def enter() -> None:
        for path in cgroup.join_files():
            Path(path).write_text("0")

    return subprocess.Popen(argv, preexec_fn=enter, **options)


def test_finds_every_hierarchy_with_a_controller(tmp_path: Path) -> None:
    info = tmp_path / "mountinfo"
    info.write_text(
        "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
        "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
        "33 31 0:30 / /mnt/m\\040y rw - cgroup cgroup rw,xattr,memory,release_agent=/x\n"
        "34 31 0:30 / /again rw - cgroup cgroup rw,memory\n"
        "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    )
    found = HierarchyV1.find(mountinfo=str(info))
    assert found is not None
    assert found.roots == {"cpu,cpuacct": "/sys/fs/cgroup/cpu,cpuacct", "memory": "/mnt/m y"}
    info.write_text("41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    assert HierarchyV1.find(mountinfo=str(info)) is None


@pytest.mark.parametrize(
    ("limit", "values"),
    [
        ({"memory": {"limit": 64 * MEBIBYTE}}, {"memory.limit_in_bytes": "67108864"}),
        (
            {"memory": {"limit": 64 * MEBIBYTE, "swap": 96 * MEBIBYTE}},
            {"memory.limit_in_bytes": "67108864", "memory.memsw.limit_in_bytes": "100663296"},
        ),
        ({"memory": {"reservation": 32 * MEBIBYTE}}, {"memory.soft_limit_in_bytes": "33554432"}),
        ({"memory": {"kernelTCP": 4 * MEBIBYTE}}, {"memory.kmem.tcp.limit_in_bytes": "4194304"}),
        ({"memory": {"swappiness": 7}}, {"memory.swappiness": "7"}),
        ({"memory": {"disableOOMKiller": True}}, {"memory.oom_control": "oom_kill_disable 1\nunder_oom 0\noom_kill 0"}),
        ({"cpu": {"shares": 512}}, {"cpu.shares": "512"}),
        ({"cpu": {"shares": 1}}, {"cpu.shares": "2"}),
        ({"cpu": {"quota": 20000, "period": 40000}}, {"cpu.cfs_quota_us": "20000", "cpu.cfs_period_us": "40000"}),
        ({"cpu": {"quota": 20000, "burst": 10000}}, {"cpu.cfs_burst_us": "10000"}),
        ({"cpu": {"idle": 1}}, {"cpu.idle": "1"}),
        (
            {"cpu": {"realtimeRuntime": 1000, "realtimePeriod": 500000}},
            {"cpu.rt_runtime_us": "1000", "cpu.rt_period_us": "500000"},
        ),
        ({"cpu": {"cpus": "0", "mems": "0"}}, {"cpuset.cpus": "0", "cpuset.mems": "0"}),
        ({"pids": {"limit": 77}}, {"pids.max": "77"}),
        (
            {"blockIO": {"throttleReadBpsDevice": [{"major": MAJOR, "minor": MINOR, "rate": 1048576}]}},
            {"blkio.throttle.read_bps_device": f"{DISK} 1048576"},
        ),
        (
            {"blockIO": {"throttleWriteBpsDevice": [{"major": MAJOR, "minor": MINOR, "rate": 1048576}]}},
            {"blkio.throttle.write_bps_device": f"{DISK} 1048576"},
        ),
        (
            {"blockIO": {"throttleReadIOPSDevice": [{"major": MAJOR, "minor": MINOR, "rate": 99}]}},
            {"blkio.throttle.read_iops_device": f"{DISK} 99"},
        ),
        (
            {"blockIO": {"throttleWriteIOPSDevice": [{"major": MAJOR, "minor": MINOR, "rate": 99}]}},
            {"blkio.throttle.write_iops_device": f"{DISK} 99"},
        ),
        ({"blockIO": {"weight": 20}}, {"blkio.bfq.weight": "20"}),
        ({"hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}]}, {"hugetlb.2MB.limit_in_bytes": "4194304"}),
        ({"network": {"classID": 1048577}}, {"net_cls.classid": "1048577"}),
        ({"network": {"priorities": [{"name": "lo", "priority": 3}]}}, {"net_prio.ifpriomap": "lo 3"}),
    ],
    ids=lambda value: re.sub(r"\W+", "_", json.dumps(value)).strip("_")[:60],
)
async def test_limits_reach_their_files_or_name_the_controller(
    cgroup: CgroupV1, limit: dict[str, Any], values: dict[str, str]
) -> None:
    missing = {file for file in values if cgroup.file(file) is None or not Path(cgroup.file(file) or "").exists()}
    if missing:
        file = min(missing)
        words = "this kernel has no" if file.partition(".")[0] in cgroup.controllers() else "is not available here"
        with pytest.raises(CgroupError, match=words):
            cgroup.apply(Resources.from_json(limit))
        return
    before = {file: content(cgroup, file) for file in values}
    cgroup.apply(Resources.from_json(limit))
    assert {file: content(cgroup, file) for file in values} == values
    await _updated_in_vain(cgroup, limit)
    assert {file: content(cgroup, file) for file in values} == values != before


async def _updated_in_vain(cgroup: CgroupV1, limit: dict[str, Any]) -> None:
    """Update to the same values, failing at the end."""
    resources = Resources.from_json(limit).updated(Resources.from_json({"rdma": {"none": {"hcaHandles": 1}}}))
    with pytest.raises(CgroupError, match=r"linux\.resources\.rdma\.none: the cgroup controller 'rdma'"):
        await cgroup.update(resources)


def test_kernel_memory_is_refused_by_a_kernel_that_takes_the_value_and_does_nothing(cgroup: CgroupV1) -> None:
    document = {"memory": {"kernel": 8 * MEBIBYTE}}
    try:
        cgroup.apply(Resources.from_json(document))
    except CgroupError as error:
        assert re.match(r"linux\.resources\.memory\.kernel: .*(this kernel|not supported)", str(error))
    else:
        assert content(cgroup, "memory.kmem.limit_in_bytes") == str(8 * MEBIBYTE)


def test_settings_of_v2_are_rejected() -> None:
    from caisson.agent.libcontainer.cgroups.v1.settings import settings

    with pytest.raises(SpecError) as caught:
        list(settings(Resources.from_json({"unified": {"memory.high": "1"}})))
    assert str(caught.value) == "linux.resources.unified: is for cgroup v2, and this machine has v1"


def test_memory_and_swap_move_up_and_down_together(cgroup: CgroupV1) -> None:
    cgroup.apply(Resources())
    for limit, swap in ((10, 20), (30, 40), (5, 6), (50, 50), (-1, -1), (7, 7)):
        document = {
            "memory": {"limit": limit * MEBIBYTE if limit > 0 else -1, "swap": swap * MEBIBYTE if swap > 0 else -1}
        }
        asyncio.run(cgroup.update(Resources.from_json(document)))
        for file, value in (("memory.limit_in_bytes", limit), ("memory.memsw.limit_in_bytes", swap)):
            assert int(content(cgroup, file)) == (value * MEBIBYTE if value > 0 else 9223372036854771712)


async def test_an_update_that_fails_leaves_all_as_it_was(cgroup: CgroupV1) -> None:
    before = {"memory": {"limit": 64 * MEBIBYTE, "swap": 64 * MEBIBYTE}, "cpu": {"quota": 10000, "period": 20000}}
    cgroup.apply(Resources.from_json(before))
    files = (
        "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.shares",
        "cpuset.cpus", "pids.max", "blkio.throttle.read_bps_device", "devices.list",
    )  # fmt: skip
    state = {file: content(cgroup, file) for file in files}
    wanted = {
        "memory": {"limit": 128 * MEBIBYTE, "swap": 256 * MEBIBYTE},
        "cpu": {"quota": 50000, "period": 100000, "shares": 99, "cpus": "0"},
        "pids": {"limit": 9},
        "blockIO": {"throttleReadBpsDevice": [{"major": MAJOR, "minor": MINOR, "rate": 5}]},
        # Set last, and invalid: a part of what is allowed as a whole.
        "devices": [
            {"allow": True, "type": "b", "access": "rw"},
            {"allow": False, "type": "b", "major": 1, "minor": 2, "access": "r"},
        ],
    }
    with pytest.raises(SpecError, match=r"cgroup v1 cannot allow b \*:\* and deny b 1:2 of it"):
        await cgroup.update(Resources.from_json(before).updated(Resources.from_json(wanted)))
    assert {file: content(cgroup, file) for file in files} == state


def test_device_rules_are_what_the_kernel_has(cgroup: CgroupV1) -> None:
    always = {
        "c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm", "c 5:0 rwm",
        "c 5:2 rwm", "c 136:* rwm",
    }  # fmt: skip

    def listed() -> set[str]:
        return set(content(cgroup, "devices.list").splitlines())

    async def update(*rules: dict[str, Any]) -> None:
        await cgroup.update(Resources.from_json({"devices": list(rules)}))

    tuntap = {"allow": True, "type": "c", "major": 10, "minor": 200, "access": "rw"}
    everything = {"allow": True, "type": "a"}
    cgroup.apply(Resources())
    assert listed() == always
    asyncio.run(update(tuntap))
    assert listed() == always | {"c 10:200 rw"}
    asyncio.run(update({**tuntap, "access": "r"}))
    assert listed() == always | {"c 10:200 r"}
    asyncio.run(update(everything, {"allow": False, "type": "b", "major": MAJOR, "minor": MINOR, "access": "rw"}))
    assert listed() == {"a *:* rwm"}
    asyncio.run(update({"allow": False, "type": "a"}))
    assert listed() == always


def test_everything_in_it_is_ended_even_what_forks_and_what_is_frozen(cgroup: CgroupV1) -> None:
    bomb = put_in(cgroup, "/bin/sh", "-c", "while :; do (sleep 100 &) ; done", stderr=subprocess.DEVNULL)
    while len(cgroup.pids()) < 30:
        assert bomb.poll() is None

    async def work() -> None:
        await cgroup.freeze()
        assert cgroup.frozen
        still = set(cgroup.pids())
        await asyncio.sleep(0.05)
        assert set(cgroup.pids()) == still
        await cgroup.kill()

    asyncio.run(work())
    assert bomb.wait() == -9
    for _ in range(100):  # the rest are reaped by this machine's init
        if not cgroup.pids():
            break
        asyncio.run(asyncio.sleep(0.02))
    assert cgroup.pids() == []


def test_cpus_that_are_plugged_in_are_offered(hierarchies: HierarchyV1, cgroup: CgroupV1) -> None:
    cgroup.apply(Resources.from_json({"cpu": {"cpus": "0"}}))
    above = Path(cgroup.file("cpuset.cpus") or "").parent.parent / "cpuset.cpus"
    everything = Path(hierarchies.roots["cpuset"], "cpuset.cpus").read_text()
    above.write_text("0")  # as before the others came
    cgroup.allow_hotplugged_cpus(above_only=True)
    assert (above.read_text(), content(cgroup, "cpuset.cpus")) == (everything, "0")
    cgroup.allow_hotplugged_cpus(above_only=False)
    assert content(cgroup, "cpuset.cpus") == everything.strip()
    asyncio.run(cgroup.update(Resources.from_json({"cpu": {"cpus": "0"}})))
    above.write_text("0")
    asyncio.run(cgroup.update(Resources.from_json({"cpu": {"cpus": everything.strip()}})))
    assert (above.read_text(), content(cgroup, "cpuset.cpus")) == (everything, everything.strip())


def test_create_rejects_a_cgroup_in_use(hierarchies: HierarchyV1, cgroup: CgroupV1) -> None:
    process = put_in(cgroup, "/bin/sleep", "100")
    with pytest.raises(CgroupError, match="container's cgroup is not empty: 1 process"):
        hierarchies.create("test")
    process.kill()
    process.wait()


async def test_a_cgroup_that_cannot_be_entered_is_named_and_nothing_is_left(box: Box, cgroup: CgroupV1) -> None:
    Path(cgroup.file("cpuset.mems") or "").write_text("\n")  # without memory nodes nobody can join
    with pytest.raises(LaunchError) as caught:
        await box.create(config("true"), cgroup=cgroup)
    assert str(caught.value) == f"cgroup {cgroup.paths['cpuset']}/cgroup.procs: no space left on device"
    assert not box.fifo.exists() and children() == []
    assert all(not files.pids_in(path) for path in cgroup.paths.values())


async def test_container_inherits_no_cgroup_descriptor(box: Box, cgroup: CgroupV1) -> None:
    cgroup.apply(Resources())
    script = "ls -l /proc/self/fd | grep -c cgroup"
    assert (await box.output(config("sh", "-c", script), cgroup=cgroup))[1].split()[0] == "0"


async def resources(client: Agent, **fields: Any) -> None:
    request = agent_pb2.UpdateContainerRequest(container_id="box", resources=oci_pb2.LinuxResources(**fields))
    await client.rpc.UpdateContainer(request)


@with_v1
async def test_limits_devices_stats_and_their_changes_over_the_api(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        spec = agent.spec("/bin/sleep", "1000")
        spec.Linux.Resources.Memory.Limit = 64 * MEBIBYTE
        spec.Linux.Resources.Devices.add(Allow=True, Type="a", Access="rwm")
        for kind in ("Bounding", "Effective", "Permitted"):
            getattr(spec.Process.Capabilities, kind).extend(["CAP_MKNOD"])
        container = await client.ensure_container("box", spec)
        request = agent_pb2.StatsContainerRequest(container_id="box")
        before = (await client.rpc.StatsContainer(request)).cgroup_stats
        assert before.memory_stats.usage.limit == 64 * MEBIBYTE
        assert before.memory_stats.usage.usage > 0 and before.memory_stats.stats["rss"] >= 0
        node = f"busybox mknod /dev/disk b {MAJOR} {MINOR} || exit 3; (: </dev/disk) 2>/dev/null || exit 4"
        assert await (await sh(container, node)).wait() == 4  # the guest's own disk (CVE-2020-2023)
        await (await sh(container, "i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done")).wait()
        after = (await client.rpc.StatsContainer(request)).cgroup_stats
        assert after.cpu_stats.cpu_usage.total_usage > before.cpu_stats.cpu_usage.total_usage
        assert len(after.cpu_stats.cpu_usage.percpu_usage) == os.cpu_count()
        assert sum(after.cpu_stats.cpu_usage.percpu_usage) >= before.cpu_stats.cpu_usage.total_usage
        assert (after.pids_stats.current, after.pids_stats.limit) == (1, 0)
        await resources(client, Memory=oci_pb2.LinuxMemory(Limit=128 * MEBIBYTE), CPU=oci_pb2.LinuxCPU(Quota=5000))
        (directory,) = (path for path in agent.cgroups() if path.name == "box" and "cpu" in path.parts)
        assert (directory / "cpu.cfs_quota_us").read_text() == "5000\n"
        unified = {"Memory": oci_pb2.LinuxMemory(Limit=2 * MEBIBYTE, Swap=MEBIBYTE)}
        code, text = await refused(resources(client, **unified))
        assert (code, text) == (
            Code.INVALID_ARGUMENT,
            "linux.resources.memory.swap: is memory plus swap, and needs a limit that is not above it",
        )
        assert (await client.rpc.StatsContainer(request)).cgroup_stats.memory_stats.usage.limit == 128 * MEBIBYTE


@with_v1
async def test_a_process_that_the_kernel_ends_for_want_of_memory_is_told_of(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        spec = agent.spec()
        spec.Linux.Resources.Memory.Limit = spec.Linux.Resources.Memory.Swap = 8 * MEBIBYTE
        container = await client.ensure_container("box", spec)
        event = asyncio.ensure_future(client.rpc.GetOOMEvent(agent_pb2.GetOOMEventRequest()))
        assert await (await sh(container, "true")).wait() == 0
        assert not event.done()
        assert await (await sh(container, "exec tail /dev/zero")).wait() == 137
        assert (await event).container_id == "box"
        again = asyncio.ensure_future(client.rpc.GetOOMEvent(agent_pb2.GetOOMEventRequest()))
        await container.remove()  # which the kernel reports on the same eventfd
        await asyncio.sleep(0.2)
        assert not again.done()
        again.cancel()

"""Test limits of a running container over the API: changed, rejected, and restored."""

from __future__ import annotations

import asyncio
import os
from itertools import count
from pathlib import Path

import pytest

from caisson.agent.client import Agent
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.kata1 import agent_pb2, oci_pb2
from tests.native.agent_support import RunningAgent, errors, refused

pytestmark = pytest.mark.root
in_both = pytest.mark.parametrize("agent", ["v2", "v1"], indirect=True)
MEBIBYTE = 1 << 20


async def update(client: Agent, resources: oci_pb2.LinuxResources) -> None:
    await client.rpc.UpdateContainer(agent_pb2.UpdateContainerRequest(container_id="box", resources=resources))


def huge(limit: int) -> oci_pb2.LinuxResources:
    """Return the only limit that this machine's cgroup v2 hierarchy certainly has."""
    return oci_pb2.LinuxResources(HugepageLimits=[oci_pb2.LinuxHugepageLimit(Pagesize="2MB", Limit=limit)])


def unrelated(agent: RunningAgent, number: int) -> oci_pb2.LinuxResources:
    """Return a limit independent of all others, in either cgroup version."""
    if "v1" in str(agent.process.args):
        return oci_pb2.LinuxResources(Pids=oci_pb2.LinuxPids(Limit=100 + number))
    return huge(number * 2 * MEBIBYTE)


async def test_a_limit_is_changed_or_all_stay(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        spec = agent.spec()
        spec.Linux.Resources.CopyFrom(huge(4 * MEBIBYTE))
        container = await client.ensure_container("box", spec)
        (directory,) = (path for path in agent.cgroups() if path.name == "box")
        file = directory / "hugetlb.2MB.max"
        assert int(file.read_text()) == 4 * MEBIBYTE
        await update(client, huge(8 * MEBIBYTE))
        assert int(file.read_text()) == 8 * MEBIBYTE
        wrong = huge(16 * MEBIBYTE)
        wrong.HugepageLimits.add(Pagesize="3MB", Limit=1)
        code, text = await refused(update(client, wrong))
        assert code is Code.INTERNAL
        assert text == "linux.resources.hugepageLimits: this kernel has no hugetlb.3MB.max"
        assert int(file.read_text()) == 8 * MEBIBYTE
        await container.remove()


async def test_updates_that_cannot_be(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        assert await refused(update(client, huge(1))) == (Code.NOT_FOUND, "Container box not found")
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec())
        nothing = agent_pb2.UpdateContainerRequest(container_id="box")
        assert await refused(client.rpc.UpdateContainer(nothing)) == (
            Code.UNKNOWN, "Resources in the request are nil",
        )  # fmt: skip
        swappy = oci_pb2.LinuxResources(Memory=oci_pb2.LinuxMemory(Swappiness=60))
        assert await refused(update(client, swappy)) == (
            Code.INVALID_ARGUMENT, "linux.resources.memory.swappiness: does not exist in cgroup v2",
        )  # fmt: skip
        await update(client, oci_pb2.LinuxResources())  # an empty request
        await container.init().signal(9)
        await container.init().wait()
        assert await refused(update(client, huge(1))) == (Code.UNKNOWN, "container not running")


@in_both
async def test_device_rules_follow_an_update_and_survive_others(agent: RunningAgent) -> None:
    """GHSA-g54h-m393-cpwq: the rules hold before and after a change of other limits."""

    async with agent.connect() as client:
        await client.create_sandbox()
        spec = agent.spec()
        kmsg = oci_pb2.LinuxDeviceCgroup(Allow=True, Type="c", Major=1, Minor=11, Access="r")
        spec.Linux.Devices.add(Path="/dev/kmsg", Type="c", Major=1, Minor=11, FileMode=0o666)
        for kind in ("Bounding", "Effective", "Permitted"):
            getattr(spec.Process.Capabilities, kind).append("CAP_SYSLOG")
        spec.Linux.Resources.Devices.add(Allow=False, Access="rwm")
        container = await client.ensure_container("box", spec)

        async def opens() -> bool:
            process = await container.exec(["/bin/sh", "-c", ": </dev/kmsg"], env=["PATH=/bin"])
            return await process.wait() == 0

        assert not await opens()
        await update(client, unrelated(agent, 1))
        assert not await opens()
        await update(client, oci_pb2.LinuxResources(Devices=[kmsg]))
        assert await opens()
        await update(client, unrelated(agent, 2))
        assert await opens()
        await update(client, oci_pb2.LinuxResources(Devices=[oci_pb2.LinuxDeviceCgroup(Type="a")]))
        assert not await opens()


@in_both
async def test_the_disk_that_the_guest_runs_from_is_out_of_reach(agent: RunningAgent) -> None:
    """CVE-2020-2023: whatever the rules allow, a node for the root disk can be made, but not opened."""
    root = Path("/").stat().st_dev
    number = count()
    assert os.major(root), "this machine's root is not on a disk"
    others = [path.name for path in Path("/sys/dev/block").iterdir() if "loop" in str(path.readlink())]
    assert others, "this machine has no loop device to compare with"

    async with agent.connect() as client:
        await client.create_sandbox()
        spec = agent.spec()
        for kind in ("Bounding", "Effective", "Permitted"):
            getattr(spec.Process.Capabilities, kind).append("CAP_MKNOD")
        spec.Linux.Resources.Devices.add(Allow=True, Type="a", Access="rwm")
        container = await client.ensure_container("box", spec)

        async def opens(major: int, minor: int, how: str) -> bool:
            node = f"/dev/disk{next(number)}"
            script = f"busybox mknod {node} b {major} {minor} || exit 3; (: {how} {node}) || exit 4"
            process = await container.exec(["/bin/sh", "-c", script], env=["PATH=/bin"])
            status = await process.wait()
            assert status in (0, 4), await errors(process)
            return status == 0

        assert not await opens(os.major(root), os.minor(root), "<")
        assert not await opens(os.major(root), os.minor(root), ">>")
        major, minor = map(int, others[0].split(":"))
        assert await opens(major, minor, "<")
        await update(client, unrelated(agent, 1))
        assert not await opens(os.major(root), os.minor(root), "<")
        await update(client, oci_pb2.LinuxResources(Devices=[oci_pb2.LinuxDeviceCgroup(Allow=True, Type="a")]))
        assert not await opens(os.major(root), os.minor(root), "<")


@pytest.mark.parametrize("asked", ["0-1000", "0"])
async def test_cpus_are_those_that_there_are(agent: RunningAgent, asked: str) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        await client.ensure_container("box", agent.spec())
        request = oci_pb2.LinuxResources(CPU=oci_pb2.LinuxCPU(Cpus=asked))
        (directory,) = (path for path in agent.cgroups() if path.name == "box")
        if not (directory / "cpuset.cpus").exists():
            text = "linux.resources.cpu.cpus: the cgroup controller 'cpuset' is not available here"
            assert await refused(update(client, request)) == (Code.INTERNAL, text)
            return
        await update(client, request)
        online = Path("/sys/devices/system/cpu/online").read_text()
        assert (directory / "cpuset.cpus").read_text() == (online if asked != "0" else "0\n")


async def test_stats_count_a_containers_usage(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        request = agent_pb2.StatsContainerRequest(container_id="box")
        assert await refused(client.rpc.StatsContainer(request)) == (Code.NOT_FOUND, "Container box not found")
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec("/bin/sleep", "1000"))
        before = (await client.rpc.StatsContainer(request)).cgroup_stats
        loop = await container.exec(["/bin/sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"])
        await loop.wait()
        after = (await client.rpc.StatsContainer(request)).cgroup_stats
        assert after.cpu_stats.cpu_usage.total_usage > before.cpu_stats.cpu_usage.total_usage + 1_000_000
        assert after.pids_stats.current == 1
        assert after.hugetlb_stats["2MB"].usage == 0
        await container.init().signal(9)
        await container.init().wait()
        ended = (await client.rpc.StatsContainer(request)).cgroup_stats
        assert ended.cpu_stats.cpu_usage.total_usage >= after.cpu_stats.cpu_usage.total_usage
        assert ended.pids_stats.current == 0


async def test_a_call_that_waits_for_memory_events_takes_no_time_of_others(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        waiting = [asyncio.ensure_future(client.rpc.GetOOMEvent(agent_pb2.GetOOMEventRequest())) for _ in range(3)]
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec())
        waiting.pop().cancel()
        await container.exec(["/bin/true"])
        await container.remove()
        assert not any(call.done() for call in waiting)
        await client.rpc.DestroySandbox(agent_pb2.DestroySandboxRequest())
        for call in waiting:
            assert (await refused(call))[0] is Code.NOT_FOUND

"""Test a guest booted for cgroup v1: containers run, are limited, paused, accounted and removed in it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from caisson.agent import client
from caisson.proto.kata1 import agent_pb2, oci_pb2
from tests.e2e.conftest import TIMEOUT, Caisson

pytestmark = pytest.mark.vm
HUGE = 4 << 20


@pytest.fixture
def guest(own: Caisson) -> Iterator[Caisson]:
    booted = own("boot-vm", "--detach", "--append", "agent.unified_cgroup_hierarchy=0")
    assert booted.returncode == 0, booted.stderr.decode()
    yield own
    assert own("stop-vm", "--all").returncode == 0


def test_a_life_in_cgroup_v1(guest: Caisson) -> None:
    asyncio.run(asyncio.wait_for(life(guest), TIMEOUT))


async def life(guest: Caisson) -> None:
    spec = client.default_spec(guest.manifest("default")["containers"]["busybox"])
    options = ["ro", "nosuid", "nodev", "noexec"]
    spec.Mounts.append(oci_pb2.Mount(destination="/sys/fs/cgroup", type="cgroup", source="cgroup", options=options))
    limits = spec.Linux.Resources
    limits.Pids.Limit, limits.CPU.Quota, limits.CPU.Shares = 12, 50_000, 512
    limits.Network.ClassID = 0x10001
    limits.Network.Priorities.add(Name="lo", Priority=5)
    limits.HugepageLimits.add(Pagesize="2MB", Limit=HUGE)
    async with client.Agent.connect(guest.run_directory / "default" / "agent.sock") as agent:
        await agent.create_sandbox()
        container = await agent.create_container("box", spec)
        await container.start()

        async def sh(script: str) -> str:
            process = await container.exec(["/bin/sh", "-c", script], env=["PATH=/bin"])
            return b"".join([data async for data in process.stdout()]).decode()

        async def stats() -> agent_pb2.CgroupStats:
            request = agent_pb2.StatsContainerRequest(container_id="box")
            answer: agent_pb2.StatsContainerResponse = await agent.rpc.StatsContainer(request)
            return answer.cgroup_stats

        names = ["cpu.cfs_quota_us", "cpu.shares", "net_cls.classid", "hugetlb.2MB.limit_in_bytes", "pids.max"]
        files = " ".join(f"/sys/fs/cgroup/{name.split('.')[0]}/{name}" for name in names)
        assert (await sh(f"cat {files}")).split() == ["50000", "512", str(0x10001), str(HUGE), "12"]
        assert "lo 5" in await sh("cat /sys/fs/cgroup/net_prio/net_prio.ifpriomap")
        assert "b *:* m" in await sh("cat /sys/fs/cgroup/devices/devices.list")
        mounts = [line.split() for line in (await sh("grep ' /sys/fs/cgroup' /proc/mounts")).splitlines()]
        assert len(mounts) > 6 and all("ro" in line[3].split(",") for line in mounts)
        assert "cpu,cpuacct" in await sh("readlink /sys/fs/cgroup/cpu")

        async def update(**fields: Any) -> None:
            resources = oci_pb2.LinuxResources(**fields)
            await agent.rpc.UpdateContainer(agent_pb2.UpdateContainerRequest(container_id="box", resources=resources))

        await update(CPU=oci_pb2.LinuxCPU(Quota=-1))
        assert (await sh("cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us")).split() == ["-1"]
        wrong = oci_pb2.LinuxBlockIO(ThrottleReadBpsDevice=[oci_pb2.LinuxThrottleDevice(Major=8, Minor=0, Rate=1)])
        with pytest.raises(client.AgentError, match=r"blockIO\.throttleReadBpsDevice.*No such device"):
            await update(CPU=oci_pb2.LinuxCPU(Shares=1000), Pids=oci_pb2.LinuxPids(Limit=3), BlockIO=wrong)
        assert (await sh("cat /sys/fs/cgroup/cpu/cpu.shares /sys/fs/cgroup/pids/pids.max")).split() == ["512", "12"]

        before = await stats()
        await sh("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
        after = await stats()
        assert after.cpu_stats.cpu_usage.total_usage > before.cpu_stats.cpu_usage.total_usage
        assert len(after.cpu_stats.cpu_usage.percpu_usage) == 1
        assert (after.pids_stats.limit, after.hugetlb_stats["2MB"].usage) == (12, 0)
        assert 1 <= after.pids_stats.current <= 3

        bomb = await container.exec(
            ["/bin/sh", "-c", "i=0; while [ $i -lt 30 ]; do sleep 1000 & i=$((i+1)); done"], env=["PATH=/bin"]
        )
        assert b"can't fork" in b"".join([data async for data in bomb.stderr()])
        await container.remove()

        container = await agent.ensure_container("box", client.default_spec(spec.Root.Path))
        loop = await container.exec(["/bin/sh", "-c", "while read line; do echo got $line; done"], env=["PATH=/bin"])
        await agent.rpc.PauseContainer(agent_pb2.PauseContainerRequest(container_id="box"))
        await loop.write(b"it\n")
        read = asyncio.ensure_future(anext(loop.stdout()))
        await asyncio.sleep(0.3)
        assert not read.done()
        await agent.rpc.ResumeContainer(agent_pb2.ResumeContainerRequest(container_id="box"))
        assert await read == b"got it\n"
        await agent.rpc.PauseContainer(agent_pb2.PauseContainerRequest(container_id="box"))
        await loop.signal(9)
        assert await loop.wait() == 137
        await container.remove()

        limited = client.default_spec(spec.Root.Path)
        limited.Linux.Resources.Memory.Limit = 64 << 20
        try:
            memory = await agent.create_container("box", limited)
        except client.AgentError as error:  # a kernel without CONFIG_MEMCG_V1 reports this
            assert error.details == (
                "linux.resources.memory.limit: the cgroup controller 'memory' is not available here"
            )
        else:
            await memory.remove()

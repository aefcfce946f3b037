"""Test containers' limits and resource usage in the guest's own cgroup v2 hierarchy, which has every controller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from caisson.agent import client
from caisson.agent.rpc.codes import StatusCode
from caisson.proto.kata1 import agent_pb2, oci_pb2
from tests.e2e.conftest import Caisson

pytestmark = pytest.mark.vm

MEBIBYTE = 1 << 20
NAME = "limited"
FILES = (
    "memory.max memory.swap.max memory.low cpu.weight cpu.max cpuset.cpus cpuset.mems pids.max hugetlb.2MB.max "
    "hugetlb.2MB.rsvd.max io.weight"
)
EVERYTHING: dict[str, Any] = {
    "Memory": {"Limit": 64 * MEBIBYTE, "Swap": 96 * MEBIBYTE, "Reservation": 16 * MEBIBYTE},
    "CPU": {"Shares": 1024, "Quota": 50_000, "Period": 100_000, "Cpus": "0-63", "Mems": "0"},
    "Pids": {"Limit": 10},
    "BlockIO": {"Weight": 505},
    "HugepageLimits": [{"Pagesize": "2MB", "Limit": 4 * MEBIBYTE}],
}


def resources(**fields: Any) -> oci_pb2.LinuxResources:
    """Return a message with these fields."""

    def made(value: Any) -> Any:
        return {key: made(item) for key, item in value.items()} if isinstance(value, dict) else value

    return oci_pb2.LinuxResources(**made(fields))


class Limited:
    """A container with its own cgroup mounted in it."""

    def __init__(self, agent: client.Agent, container: client.Container) -> None:
        self.agent = agent
        self.container = container

    async def sh(self, script: str) -> tuple[int, bytes]:
        """Run a script in it; return the status and output."""
        process = await self.container.exec(["/bin/sh", "-c", script], env=["PATH=/bin"])
        output = b"".join([data async for data in process.stdout()])
        return await process.wait(), output

    async def files(self) -> dict[str, str]:
        """Return its limits."""
        _, output = await self.sh(f"cd /sys/fs/cgroup; for f in {FILES}; do echo $f=$(cat $f); done")
        return dict(line.split("=") for line in output.decode().splitlines())

    async def update(self, **fields: Any) -> None:
        request = agent_pb2.UpdateContainerRequest(container_id=NAME, resources=resources(**fields))
        await self.agent.rpc.UpdateContainer(request)

    async def stats(self) -> agent_pb2.CgroupStats:
        request = agent_pb2.StatsContainerRequest(container_id=NAME)
        answer: agent_pb2.StatsContainerResponse = await self.agent.rpc.StatsContainer(request)
        return answer.cgroup_stats


@asynccontextmanager
async def limited(vm: Caisson, limits: dict[str, Any], *args: str) -> AsyncIterator[Limited]:
    """Run a container with limits in the running VM, started unless it has its own program."""
    spec = client.default_spec(vm.manifest("default")["containers"]["busybox"], args)
    options = ["ro", "nosuid", "nodev", "noexec"]
    spec.Mounts.append(oci_pb2.Mount(destination="/sys/fs/cgroup", type="cgroup", source="cgroup", options=options))
    spec.Linux.Resources.CopyFrom(resources(**limits))
    async with client.Agent.connect(vm.run_directory / "default" / "agent.sock") as agent:
        await agent.create_sandbox()
        container = await agent.create_container(NAME, spec)
        try:
            if not args:
                await container.start()
            yield Limited(agent, container)
        finally:
            await container.remove()


async def test_limits_are_set_and_hold(vm: Caisson) -> None:
    script = "i=0; while [ $i -lt 20 ]; do sleep 1000 & i=$((i+1)); done"

    async with limited(vm, EVERYTHING, "/bin/sh", "-c", script) as box:
        await box.container.start()
        init = box.container.init()
        errors = b"".join([data async for data in init.stderr()])
        assert b"can't fork" in errors  # the eleventh process
        assert await init.wait() != 0


async def test_every_limit_reaches_its_file(vm: Caisson) -> None:
    async with limited(vm, EVERYTHING) as box:
        assert await box.files() == {
            "memory.max": str(64 * MEBIBYTE),
            "memory.swap.max": str(32 * MEBIBYTE),
            "memory.low": str(16 * MEBIBYTE),
            "cpu.weight": "100",
            "cpu.max": "50000 100000",
            "cpuset.cpus": "0",  # all CPUs of the guest
            "cpuset.mems": "0",
            "pids.max": "10",
            "hugetlb.2MB.max": str(4 * MEBIBYTE),
            "hugetlb.2MB.rsvd.max": str(4 * MEBIBYTE),
            "io.weight": "default 5000",
        }


async def test_limits_of_a_running_container_change_all_or_none(vm: Caisson) -> None:
    async with limited(vm, EVERYTHING) as box:
        before = await box.files()
        await box.update(Memory={"Limit": 80 * MEBIBYTE}, CPU={"Quota": -1}, Pids={"Limit": 20})
        after = await box.files()
        assert after == before | {
            "memory.max": str(80 * MEBIBYTE),
            "memory.swap.max": str(16 * MEBIBYTE),  # the total of memory and swap is unchanged
            "cpu.max": "max 100000",
            "pids.max": "20",
        }
        with pytest.raises(client.AgentError) as caught:
            await box.update(
                Memory={"Limit": 40 * MEBIBYTE},
                CPU={"Shares": 2, "Quota": 20_000},
                Pids={"Limit": 7},
                BlockIO={"ThrottleReadBpsDevice": [{"Major": 8, "Minor": 0, "Rate": 1000}]},  # no such disk
            )
        assert caught.value.code is StatusCode.INTERNAL
        assert caught.value.details == (
            "linux.resources.blockIO.throttleReadBpsDevice: io.max = '8:0 rbps=1000': No such device"
        )
        assert await box.files() == after


async def test_stats_count_a_containers_usage(vm: Caisson) -> None:
    async with limited(vm, EVERYTHING) as box:
        before = await box.stats()
        assert before.memory_stats.usage.limit == 64 * MEBIBYTE
        assert before.memory_stats.swap_usage.limit == 96 * MEBIBYTE
        assert before.pids_stats.limit == 10
        status, _ = await box.sh(
            "dd if=/dev/zero of=/tmp/file bs=1M count=8; i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done"
        )
        assert status == 0
        after = await box.stats()
        assert 1 <= after.pids_stats.current <= 2  # a shell, and the program with which it waits
        assert after.cpu_stats.cpu_usage.total_usage > before.cpu_stats.cpu_usage.total_usage
        assert after.cpu_stats.cpu_usage.usage_in_usermode > before.cpu_stats.cpu_usage.usage_in_usermode
        assert after.cpu_stats.throttling_data.periods > before.cpu_stats.throttling_data.periods
        assert after.memory_stats.usage.usage >= 8 * MEBIBYTE > before.memory_stats.usage.usage
        assert after.memory_stats.usage.max_usage >= after.memory_stats.usage.usage
        assert after.memory_stats.stats["shmem"] >= 7 * MEBIBYTE  # a tmpfs; the kernel updates totals occasionally
        assert after.memory_stats.use_hierarchy
        assert after.hugetlb_stats["2MB"].usage == 0


async def test_a_process_that_the_kernel_ends_for_want_of_memory_is_told_of(vm: Caisson) -> None:
    limits = {"Memory": {"Limit": 24 * MEBIBYTE, "Swap": 24 * MEBIBYTE}}
    async with limited(vm, limits) as box:
        event = asyncio.ensure_future(box.agent.rpc.GetOOMEvent(agent_pb2.GetOOMEventRequest()))
        assert (await box.sh("true"))[0] == 0
        assert not event.done()
        status, _ = await box.sh("exec tail /dev/zero")
        assert status == 137
        assert (await event).container_id == NAME
        again = asyncio.ensure_future(box.agent.rpc.GetOOMEvent(agent_pb2.GetOOMEventRequest()))
        assert (await box.sh("true"))[0] == 0
        assert not again.done()
        again.cancel()


async def test_too_little_memory_to_start_is_said_so(vm: Caisson) -> None:
    with pytest.raises(client.AgentError) as caught:
        async with limited(vm, {"Memory": {"Limit": 4096}}):
            pass
    assert caught.value.details == "Could not run process: container init was OOM-killed (memory limit too low?)"


async def test_a_frozen_container_is_ended(vm: Caisson) -> None:
    async with limited(vm, {}) as box:
        process = await box.container.exec(["/bin/sleep", "1000"])
        await box.agent.rpc.PauseContainer(agent_pb2.PauseContainerRequest(container_id=NAME))
        await process.signal(9)
        assert await process.wait() == 137

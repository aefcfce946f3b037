"""What a container may use, set in the guest's own cgroup v2 hierarchy."""

from __future__ import annotations

import asyncio

import pytest

from agent import client
from proto import oci_pb2
from tests.e2e.conftest import Caisson

pytestmark = pytest.mark.vm

SCRIPT = """
cd /sys/fs/cgroup
cat pids.max memory.max cpu.max cpuset.cpus.effective
i=0; while [ $i -lt 20 ]; do sleep 1000 & i=$((i+1)); done
"""


async def run_limited(vm: Caisson) -> tuple[int, bytes, bytes]:
    """Run SCRIPT as a container with limits; its status, output and errors."""
    rootfs = vm.manifest("default")["containers"]["busybox"]
    spec = client.default_spec(rootfs, ["/bin/sh", "-c", SCRIPT])
    options = ["ro", "nosuid", "nodev", "noexec"]
    spec.Mounts.append(oci_pb2.Mount(destination="/sys/fs/cgroup", type="cgroup", source="cgroup", options=options))
    spec.Linux.Resources.Pids.Limit = 10
    spec.Linux.Resources.Memory.Limit = 64 << 20
    spec.Linux.Resources.CPU.Quota = 50_000
    spec.Linux.Resources.CPU.Period = 100_000
    spec.Linux.Resources.CPU.Cpus = "0"
    async with client.Agent.connect(vm.run_directory / "default" / "agent.sock") as agent:
        await agent.create_sandbox()
        container = await agent.create_container("limited", spec)
        try:
            await container.start()
            init = container.init()
            output = b"".join([data async for data in init.stdout()])
            errors = b"".join([data async for data in init.stderr()])
            return await init.wait(), output, errors
        finally:
            await container.remove()


def test_limits_are_set_and_hold(vm: Caisson) -> None:
    status, output, errors = asyncio.run(run_limited(vm))
    assert output.split() == [b"10", b"67108864", b"50000", b"100000", b"0"], (output, errors)
    assert b"can't fork" in errors  # the eleventh process
    assert status != 0

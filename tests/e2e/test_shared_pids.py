"""Test a sandbox with one pid namespace in a guest: its kernel, its cgroups, and an agent that is PID 1 itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from caisson.agent.client import Agent, Container, default_spec
from caisson.proto.kata1 import agent_pb2
from tests.e2e.conftest import Caisson

pytestmark = [pytest.mark.root, pytest.mark.vm]


async def says(container: Container, script: str) -> list[str]:
    process = await container.exec(["sh", "-c", script], env=["PATH=/bin:/sbin"])
    words = b"".join([data async for data in process.stdout()]).decode().split()
    assert await process.wait() == 0
    return words


async def test_containers_see_each_other_and_end_alone(vm: Caisson) -> None:
    root = vm.manifest("default")["containers"]["busybox"]
    names = "for p in /proc/[0-9]*; do cat $p/comm; done 2>/dev/null || true"

    async def work(socket: Path) -> None:
        async with Agent.connect(socket) as client:
            await client.destroy_sandbox()  # whatever other tests have left
            await client.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(sandbox_id="pod", sandbox_pidns=True))
            one = await client.create_container("one", default_spec(root))
            two = await client.create_container("two", default_spec(root, ["sleep", "4444"]))
            await one.start()
            await two.start()
            # An orphan of the second outlives its parent, and is reparented to the pause process; it ends with its
            # container.
            await says(two, "(setsid tail -f /dev/null &)")
            there = await says(one, names)
            assert there[0] == "pause"
            assert {"tail", "sleep"} <= set(there)
            assert "PPid: 1" in " ".join(await says(one, "cat /proc/$(pidof tail)/status"))
            await two.remove()
            assert "tail" not in await says(one, names)
            # Orphans are reaped: no zombie remains.
            assert await says(one, "for n in 1 2 3; do (sleep 0.1 &) ; done; sleep 0.5; cat /proc/[0-9]*/stat") != []
            states = await says(one, "cut -d' ' -f2,3 /proc/[0-9]*/stat 2>/dev/null || true")
            assert "Z" not in states
            await client.destroy_sandbox()

    await work(vm.run_directory / "default/agent.sock")

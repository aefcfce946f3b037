"""Run many containers and large transfers at once: nothing is lost, nothing is leaked."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from caisson.agent.client import Agent, Container
from tests.native.agent_support import RunningAgent, output, sh

pytestmark = [pytest.mark.root, pytest.mark.nightly]

CONTAINERS, EXECS, CONCURRENCY = 200, 1000, 50
SIZE = 64 << 10
GIGABYTE = 1 << 30


@pytest.mark.timeout(300)
async def test_a_thousand_execs_in_two_hundred_containers(agent: RunningAgent) -> None:
    # Each writes its own output: numbered lines, cut at 64 KiB.
    script = 'i=0; while [ $i -lt 6000 ]; do echo "$0 $i"; i=$((i + 1)); done | head -c 65536'

    def expected(number: int) -> str:
        whole = "".join(f"{number} {line}\n" for line in range(6000))[:SIZE]
        assert len(whole) == SIZE
        return hashlib.sha256(whole.encode()).hexdigest()

    async def one(containers: list[Container], number: int) -> None:
        container = containers[number % len(containers)]
        process = await container.exec(["/bin/sh", "-c", script, str(100000 + number)], env=["PATH=/bin"])
        digest = hashlib.sha256()
        async for data in process.stdout():
            digest.update(data)
        assert digest.hexdigest() == expected(100000 + number), number
        assert await process.wait() == 0

    async def many(client: Agent, containers: list[Container], numbers: range) -> None:
        gate = asyncio.Semaphore(CONCURRENCY)

        async def gated(number: int) -> None:
            async with gate:
                await one(containers, number)

        await asyncio.gather(*map(gated, numbers))

    async with agent.connect() as client:
        await client.create_sandbox()
        made = [
            await client.ensure_container(f"c{number}", agent.spec("/bin/sleep", "1000"))
            for number in range(CONTAINERS)
        ]
        await many(client, made, range(CONTAINERS))  # each was used once
        fds, memory, children = agent.fds(), agent.memory(), agent.children()
        await many(client, made, range(EXECS))
        assert agent.fds() == fds
        assert agent.children() == children
        assert agent.memory() - memory < 8 << 20
        await client.destroy_sandbox()
        assert agent.children() == set()


@pytest.mark.timeout(300)
async def test_a_gigabyte_through_one_exec(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.ensure_container("c", agent.spec("/bin/sleep", "1000"))
        assert await output(await sh(container, "echo warm")) == b"warm\n"
        memory, most, size = agent.memory(), 0, 0
        process = await sh(container, f"head -c {GIGABYTE} /dev/zero")
        async for data in process.stdout():
            size += len(data)
            if size % (64 << 20) < len(data):
                most = max(most, agent.memory())
        assert size == GIGABYTE
        assert await process.wait() == 0
        assert most - memory < 16 << 20

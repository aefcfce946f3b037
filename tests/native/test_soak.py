"""Run two thousand creates and execs through one agent, many at a time, many of which fail: nothing is left."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from caisson.agent.client import Agent, AgentError, Container
from caisson.proto.kata1 import oci_pb2
from tests.native.agent_support import RunningAgent, errors, output, sh
from tests.support.poll import until

pytestmark = pytest.mark.root

ROUNDS, CALLS_PER_ROUND, CONCURRENCY = 5, 400, 50

#: Bytes by which the agent may have grown in the second half: an allocator's pages, but no leak; 2,000 calls that leak
#: 4 KiB each would be twice as much.
GROWTH = 4 << 20


class Soak:
    """Random actions; each removes what it leaves, or leaves nothing."""

    def __init__(self, client: Agent, agent: RunningAgent, base: Container) -> None:
        self._client = client
        self._agent = agent
        self._base = base
        self._number = 0
        self.done: Counter[str] = Counter()

    @property
    def kinds(self) -> list[Callable[[], Awaitable[None]]]:
        return [
            self.exec_that_ends_at_once,
            self.exec_that_ends_at_once,
            self.exec_with_output,
            self.exec_that_is_killed,
            self.exec_on_a_terminal,
            self.exec_of_a_missing_program,
            self.exec_in_a_bad_directory,
            self.exec_that_is_hung_up_on,
            self.create_and_remove,
            self.create_start_and_remove,
            self.create_with_execs_and_remove,
            self.create_of_a_missing_program,
            self.create_with_a_bad_mount,
        ]

    async def one(self, kind: Callable[[], Awaitable[None]]) -> None:
        await kind()
        self.done[kind.__name__] += 1

    def _name(self) -> str:
        self._number += 1
        return f"n{self._number}"

    async def exec_that_ends_at_once(self) -> None:
        assert await (await self._base.exec(["/bin/true"])).wait() == 0

    async def exec_with_output(self) -> None:
        process = await sh(self._base, "echo out; echo err >&2; exit 3")
        assert await output(process) == b"out\n"
        assert await process.wait() == 3
        assert await errors(process) == b"err\n"

    async def exec_that_is_killed(self) -> None:
        process = await self._base.exec(["/bin/sleep", "1000"])
        await process.signal(9)
        assert await process.wait() == 137

    async def exec_on_a_terminal(self) -> None:
        process = await sh(self._base, "tty", terminal=True)
        assert b"/dev/pts/" in await output(process)
        assert await process.wait() == 0

    async def exec_of_a_missing_program(self) -> None:
        with pytest.raises(AgentError, match="executable file not found"):
            await self._base.exec(["missing"], env=["PATH=/bin"])

    async def exec_in_a_bad_directory(self) -> None:
        with pytest.raises(AgentError, match="/missing"):
            await self._base.exec(["/bin/true"], cwd="/missing")

    async def exec_that_is_hung_up_on(self) -> None:
        call = asyncio.ensure_future(self._base.exec(["/bin/true"]))
        await asyncio.sleep(random.random() * 0.004)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    async def create_and_remove(self) -> None:
        await (await self._client.create_container(self._name(), self._spec())).remove()

    async def create_start_and_remove(self) -> None:
        container = await self._client.create_container(self._name(), self._spec())
        await container.start()
        await container.remove()

    async def create_with_execs_and_remove(self) -> None:
        container = await self._client.ensure_container(self._name(), self._spec())
        calls = [asyncio.ensure_future(container.exec(["/bin/sleep", "1000"])) for _ in range(3)]
        await calls[0]
        await container.remove()
        await asyncio.gather(*calls, return_exceptions=True)

    async def create_of_a_missing_program(self) -> None:
        with pytest.raises(AgentError, match="executable file not found"):
            await self._client.create_container(self._name(), self._agent.spec("missing"))

    async def create_with_a_bad_mount(self) -> None:
        spec = self._spec()
        spec.Mounts.append(oci_pb2.Mount(destination="/mnt", source="/missing", type="bind", options=["bind"]))
        with pytest.raises(AgentError, match="/missing"):
            await self._client.create_container(self._name(), spec)

    def _spec(self) -> oci_pb2.Spec:
        return self._agent.spec("/bin/sleep", "1000")


@pytest.mark.nightly
@pytest.mark.timeout(600)
async def test_nothing_is_left_of_two_thousand(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        base = await client.ensure_container("base", agent.spec("/bin/sh", "-c", "while :; do sleep 1000; done"))
        soak = Soak(client, agent, base)
        await asyncio.gather(*(soak.one(kind) for kind in soak.kinds))
        await until(lambda: len(agent.children()) == 1, "stages have ended")
        fds, mounts, cgroups = agent.fds(), own_mounts(agent), len(agent.cgroups())
        chance = random.Random(7)
        memory = []
        for _ in range(ROUNDS):
            gate = asyncio.Semaphore(CONCURRENCY)

            async def gated(kind: Callable[[], Awaitable[None]], gate: asyncio.Semaphore) -> None:
                async with gate:
                    await soak.one(kind)

            chosen = [chance.choice(soak.kinds) for _ in range(CALLS_PER_ROUND)]
            await asyncio.gather(*(gated(kind, gate) for kind in chosen))
            await until(lambda: len(agent.children()) == 1, "every process has ended and is reaped")
            memory.append(agent.memory())
        assert sum(soak.done.values()) >= ROUNDS * CALLS_PER_ROUND
        assert min(soak.done.values()) > ROUNDS * CALLS_PER_ROUND / 30, soak.done
        await until(lambda: agent.fds() <= fds, "no descriptor is left")
        assert own_mounts(agent) == mounts
        assert len(agent.cgroups()) == cgroups
        assert sorted(path.name for path in (agent.state / "sandbox").iterdir()) == [".namespaces", "base"]
        assert memory[-1] - memory[len(memory) // 2] < GROWTH, memory


def own_mounts(agent: RunningAgent) -> int:
    """Count mounts in the agent's directory: others on the machine come and go."""
    place = str(agent.state.parent)
    return sum(place in line for line in Path(f"/proc/{agent.process.pid}/mountinfo").read_text().splitlines())

"""Test that data about a container's processes is read in bounded pieces, by threads that block nobody else."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from caisson.agent.client import Agent, Container
from caisson.agent.client.listing import parse_table
from caisson.proto.kata1 import agent_pb2, oci_pb2
from tests.native.agent_support import RunningAgent

pytestmark = pytest.mark.root

#: MiB of command line; seconds in which ps responds, and any other call meanwhile.
ARGUMENTS_MIB, MAX_LATENCY = 1500, 2.0


@pytest.fixture(scope="module")
def longargs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a directory containing the program (tests/native/longargs.c)."""
    directory = tmp_path_factory.mktemp("longargs")
    source = Path(__file__).with_name("longargs.c")
    target = directory / "longargs"
    subprocess.run(["musl-gcc", "-O2", "-Wall", "-Wextra", "-static", "-s", "-o", target, source], check=True)
    directory.chmod(0o755)
    return directory


@asynccontextmanager
async def liar(client: Agent, agent: RunningAgent, longargs: Path, count: int) -> AsyncIterator[Container]:
    """Start a container with processes of such a command line, as an ordinary user."""
    await client.create_sandbox()
    spec = agent.spec()
    spec.Mounts.append(oci_pb2.Mount(destination="/mnt", type="bind", source=str(longargs), options=["rbind", "ro"]))
    container = await client.ensure_container("liar", spec)
    for _ in range(count):
        process = await container.exec(["/mnt/longargs", str(ARGUMENTS_MIB)], uid=1000, gid=1000)
        assert await anext(process.stdout()) == b"ready\n"
    yield container
    await container.remove()


async def listed(client: Agent, container_id: str) -> str:
    request = agent_pb2.ListProcessesRequest(container_id=container_id, format="table")
    return bytes((await client.rpc.ListProcesses(request)).process_list).decode()


async def test_a_command_line_of_1500_mib_costs_nothing(agent: RunningAgent, longargs: Path) -> None:
    async with agent.connect() as client, agent.connect() as neighbour, liar(client, agent, longargs, 3):
        await listed(client, "liar")
        before, began = agent.memory(), time.monotonic()
        table = asyncio.ensure_future(listed(client, "liar"))
        await neighbour.version()
        assert time.monotonic() - began < MAX_LATENCY
        rows = [row for row in parse_table(await table) if "longargs" in row["command"]]
        assert time.monotonic() - began < MAX_LATENCY
        assert len(rows) == 3 and all(len(row["command"]) <= 4096 for row in rows)
        assert agent.memory() - before < 4 << 20


async def test_a_process_in_65000_groups_is_stopped_as_any_other(agent: RunningAgent) -> None:
    """Its status, from which its handlers are read, has 400 KB."""
    async with agent.connect() as client:
        await client.create_sandbox()
        spec = agent.spec("/bin/sleep", "1000")
        spec.Process.User.AdditionalGids.extend(range(100_000, 165_000))
        container = await client.ensure_container("many", spec)
        began = time.monotonic()
        await container.init().signal(15)  # it has no handler: it gets SIGKILL
        assert await container.init().wait() == 137
        assert time.monotonic() - began < MAX_LATENCY
        await container.remove()

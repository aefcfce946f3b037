"""Test cgroups that a container creates below its own: deep, many, and with all processes moved into them."""

from __future__ import annotations

import asyncio
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from caisson.agent.client import Agent
from caisson.agent.libcontainer.cgroups import files
from caisson.agent.libcontainer.cgroups.v2.cgroup import NESTING
from caisson.proto.kata1 import agent_pb2
from tests.native.agent_support import RunningAgent, output, sh

pytestmark = pytest.mark.root
in_both = pytest.mark.parametrize("agent", ["v2", "v1"], indirect=True)

LEVELS, NAME = 60, "x" * 250
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY

#: While thousands of cgroups are walked, any other call is answered within this part of the time.
MAX_LATENCY_SHARE = 0.6


def own(agent: RunningAgent) -> Path:
    """Return the directory in which the processes of the container "box" are counted."""
    found = [path for path in agent.cgroups() if path.name == "box"]
    return next((path for path in found if "freezer" in path.parts), found[0])


def nest(directory: Path, levels: int) -> int:
    """Create nested cgroups, as deep as possible; return a descriptor of the innermost."""
    at = os.open(directory, DIRECTORY)
    for _ in range(levels):
        try:
            os.mkdir(NAME, dir_fd=at)
        except BlockingIOError:  # EAGAIN: cgroup.max.depth
            break
        below = os.open(NAME, DIRECTORY, dir_fd=at)
        os.close(at)
        at = below
    return at


async def pids(client: Agent) -> list[int]:
    request = agent_pb2.ListProcessesRequest(container_id="box", format="json")
    return list(json.loads((await client.rpc.ListProcesses(request)).process_list))


async def test_cgroups_are_nested_to_a_bounded_depth(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec())
        os.close(nest(own(agent), LEVELS))
        assert sum(1 for _ in files.walk(str(own(agent)))) - 1 == int(NESTING["cgroup.max.depth"]) < LEVELS
        await container.remove()


@in_both
async def test_thousands_of_cgroups_stop_nobody(agent: RunningAgent) -> None:
    async with agent.connect() as client, agent.connect() as neighbour:
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec())
        directory = os.open(own(agent), DIRECTORY)
        try:
            with suppress(BlockingIOError):  # cgroup.max.descendants
                for number in range(3000):
                    os.mkdir(str(number), dir_fd=directory)
        finally:
            os.close(directory)
        for work in (pids(client), container.remove()):
            walking = asyncio.ensure_future(work)
            longest, start = 0.0, time.monotonic()
            while not walking.done():
                began = time.monotonic()
                await neighbour.version()
                longest = max(longest, time.monotonic() - began)
            await walking
            assert longest < MAX_LATENCY_SHARE * (time.monotonic() - start)


async def test_exec_joins_the_first_process_where_the_container_divided_its_cgroup(agent: RunningAgent) -> None:
    """As systemd and container engines do: all processes move into a child cgroup, which then gets controllers."""
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec())
        leaf = own(agent) / "init.scope"
        leaf.mkdir()
        for pid in await pids(client):
            (leaf / "cgroup.procs").write_text(str(pid))
        controller = (own(agent) / "cgroup.controllers").read_text().split()[0]
        (own(agent) / "cgroup.subtree_control").write_text(f"+{controller}")
        descriptors = agent.fds()
        for terminal in (False, True):
            process = await sh(container, "cat /proc/self/cgroup", terminal=terminal)
            assert "init.scope" in (await output(process)).decode()
            assert await process.wait() == 0
        del process
        (leaf / "cgroup.procs").read_text()
        await container.signal(9)
        await container.remove()
        assert agent.fds() <= descriptors

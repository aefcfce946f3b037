"""Test paused containers, and listing a container's processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal

import pytest

from caisson.agent.client import AgentError
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.kata1 import agent_pb2
from tests.native.agent_support import RunningAgent, output, refused, sh

pytestmark = [pytest.mark.root, pytest.mark.parametrize("agent", ["v2", "v1"], indirect=True)]
PAUSE, RESUME = (
    agent_pb2.PauseContainerRequest(container_id="box"),
    agent_pb2.ResumeContainerRequest(container_id="box"),
)


async def test_a_paused_container_stands_still(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec())
        assert await refused(client.rpc.ResumeContainer(RESUME)) == (Code.UNKNOWN, "container not paused")
        process = await sh(container, "while read line; do echo got $line; done")
        await client.rpc.PauseContainer(PAUSE)
        code, text = await refused(client.rpc.PauseContainer(PAUSE))
        assert (code, text) == (Code.UNKNOWN, "container not running or created: paused")
        code, text = await refused(container.exec(["/bin/true"]))
        assert (code, text) == (Code.FAILED_PRECONDITION, "Cannot exec in paused container box")
        code, text = await refused(container.start())
        assert text == "Container box status paused, should be created"
        await process.write(b"it\n")
        read = asyncio.ensure_future(anext(process.stdout()))
        await asyncio.sleep(0.1)
        assert not read.done()
        await client.rpc.ResumeContainer(RESUME)
        assert await read == b"got it\n"
        await container.exec(["/bin/true"])


async def test_a_signal_wakes_a_paused_container(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        # An init that survives the signal: its exit would end all others, by SIGKILL.
        container = await client.ensure_container("box", agent.spec("/bin/sleep", "1000"))
        processes = [await container.exec(["/bin/sleep", "1000"]) for _ in range(2)]
        await client.rpc.PauseContainer(PAUSE)
        await processes[0].signal(15)
        assert [await process.wait() for process in processes] == [143, 143]
        assert await refused(client.rpc.ResumeContainer(RESUME)) == (Code.UNKNOWN, "container not paused")


SIGNAL = agent_pb2.SignalProcessRequest(container_id="box", signal=signal.SIGURG)  # ignored by default


@pytest.mark.parametrize("call", ["PauseContainer", "SignalProcess"])
async def test_a_host_that_hangs_up_leaves_no_container_frozen(agent: RunningAgent, call: str) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec("/bin/sleep", "1000"))
        await sh(container, "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done")
        chance = random.Random(5)
        for _ in range(25):
            with contextlib.suppress(TimeoutError):
                request = PAUSE if call == "PauseContainer" else SIGNAL
                await asyncio.wait_for(getattr(client.rpc, call)(request), chance.random() * 0.02)
            with contextlib.suppress(AgentError):
                await client.rpc.ResumeContainer(RESUME)
            echo = await asyncio.wait_for(sh(container, "echo on"), 20)
            assert await output(echo) == b"on\n"


@pytest.mark.parametrize("started", [False, True])
async def test_a_paused_container_can_be_removed(agent: RunningAgent, started: bool) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.create_container("box", agent.spec())
        if started:
            await container.start()
        await client.rpc.PauseContainer(PAUSE)
        await container.remove(timeout=20)
        assert agent.children() == set()
        assert (await refused(client.rpc.PauseContainer(PAUSE)))[0] is Code.NOT_FOUND


async def test_processes_of_a_container_are_listed(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        request = agent_pb2.ListProcessesRequest(container_id="box", format="json")
        assert await refused(client.rpc.ListProcesses(request)) == (Code.NOT_FOUND, "Container box not found")
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec("/bin/sleep", "1000"))
        for _ in range(2):
            await container.exec(["/bin/sleep", "1000"])
        pids: list[int] = []
        while len(pids) != 3:  # nsexec's own stages may still be exiting
            pids = json.loads((await client.rpc.ListProcesses(request)).process_list)
        assert set(pids) == agent.children()
        for form in ("", "yaml"):
            request.format = form
            answer = await refused(client.rpc.ListProcesses(request))
            assert answer == (Code.UNKNOWN, "invalid format option")
        request.format = "table"
        heading, *lines = (await client.rpc.ListProcesses(request)).process_list.decode().splitlines()
        column = heading.split().index("PID")  # as hosts find it
        assert {int(line.split()[column]) for line in lines} == set(pids)
        assert all(line.endswith("/bin/sleep 1000") and len(line.split()) == 9 for line in lines)
        request.args.append("-ef")
        assert b"sleep" in (await client.rpc.ListProcesses(request)).process_list
        request.args[0] = "aux"
        assert (await refused(client.rpc.ListProcesses(request)))[0] is Code.UNIMPLEMENTED

"""Test running an exited container again, on the files it left (caisson.Guest, RecreateContainer)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from caisson.agent.client import Agent, Container
from caisson.agent.client import logs as container_logs
from caisson.agent.client.listing import processes
from caisson.agent.client.registry import Registry
from caisson.agent.client.specs import container_document
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.caisson import caisson_pb2
from tests.native.agent_support import RunningAgent, output, refused, sh

pytestmark = pytest.mark.root


async def made(agent: RunningAgent, client: Agent, place: Path, script: str) -> Container:
    """Create a container with its own tmpfs at /data, which exists as long as the agent keeps its storages mounted."""
    layer = str(place / "layer")
    document = container_document(str(agent.rootfs), ["/bin/sh", "-c", script], scratch=("/tmp",))
    document["mounts"].append({"destination": "/data", "type": "bind", "source": layer, "options": ["rbind", "rw"]})
    storage = caisson_pb2.Storage(driver="mmioblk", source="tmpfs", fstype="tmpfs", mount_point=layer)
    (agent.rootfs / "data").mkdir(exist_ok=True)
    await client.create_sandbox()
    container = await client.create_container("box", document, [storage])
    await container.start()
    return container


async def test_it_finds_its_files_again(agent: RunningAgent, tmp_path: Path) -> None:
    async with agent.connect() as client:
        container = await made(agent, client, tmp_path, "echo run >>/data/runs; wc -l </data/runs; exit 5")
        assert await output(container.init()) == b"1\n"
        assert await container.init().wait() == 5
        for count in (b"2\n", b"3\n"):
            await container_logs.restart(client, container)
            assert await container.init().wait() == 5
            kept = container_logs.entries(client, "box", follow=True)
            assert b"".join([entry.data async for entry in kept]) == count
        await container.remove()
        assert (await refused(container.recreate()))[0] is Code.NOT_FOUND
    assert agent.children() == set()


async def test_processes_run_in_it_again(agent: RunningAgent, tmp_path: Path) -> None:
    async with agent.connect() as client:
        container = await made(agent, client, tmp_path, "[ -e /data/again ] && exec sleep 1000; touch /data/again")
        await container.init().wait()
        await container_logs.restart(client, container)
        assert await output(await sh(container, "echo inside")) == b"inside\n"
        await container.remove(timeout=30)


async def test_one_that_runs_is_left_alone(agent: RunningAgent, tmp_path: Path) -> None:
    async with agent.connect() as client:
        container = await made(agent, client, tmp_path, "exec sleep 1000")
        code, text = await refused(container.recreate())
        assert code is Code.FAILED_PRECONDITION and "cannot be created again: it is running" in text
        assert await output(await sh(container, "echo runs")) == b"runs\n"


async def test_of_many_callers_one_starts_it(agent: RunningAgent, tmp_path: Path) -> None:
    async with agent.connect() as client:
        container = await made(agent, client, tmp_path, "[ -e /data/again ] && exec sleep 1000; touch /data/again")
        await container.init().wait()
        answers = await asyncio.gather(*(container.recreate() for _ in range(10)), return_exceptions=True)
        assert sum(answer is None for answer in answers) == 1
        await container.start()
        assert await output(await sh(container, "echo runs")) == b"runs\n"


async def test_one_that_cannot_run_any_more_is_removed_with_what_was_mounted(
    agent: RunningAgent, tmp_path: Path
) -> None:
    async with agent.connect() as client:
        container = await made(agent, client, tmp_path, "true")
        await container.init().wait()
        program = agent.rootfs / "bin/sh"
        moved = program.rename(agent.rootfs / "bin/elsewhere")
        try:
            assert "no such file or directory" in (await refused(container.recreate()))[1]
        finally:
            moved.rename(program)
        assert (await refused(container.recreate()))[0] is Code.NOT_FOUND
    assert str(tmp_path / "layer") not in Path(f"/proc/{agent.pid}/mountinfo").read_text()


async def test_a_list_has_the_exit_status_of_one_that_has_ended(agent: RunningAgent, tmp_path: Path) -> None:
    async with agent.connect() as client:
        container = await made(
            agent, client, tmp_path, "[ -e /data/again ] && exec sleep 1000; touch /data/again; exit 9"
        )
        await container.init().wait()
        (ended,) = await processes(client, Registry(tmp_path / "none"), "box")
        assert (ended["processes"], ended["exit_status"]) == ([], 9)
        await container_logs.restart(client, container)
        (runs,) = await processes(client, Registry(tmp_path / "none"), "box")
        assert len(runs["processes"]) == 1 and runs["exit_status"] is None

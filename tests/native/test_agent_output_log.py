"""Test containers that nobody is attached to: their output is drained and kept, and can be read repeatedly."""

from __future__ import annotations

import asyncio

import pytest

from caisson.agent.client import Agent, Container
from caisson.agent.client import logs as container_logs
from caisson.agent.rpc.codes import StatusCode
from caisson.proto.caisson import caisson_pb2
from tests.native.agent_support import RunningAgent, refused

pytestmark = pytest.mark.root


async def detached(agent: RunningAgent, client: Agent, script: str, max_bytes: int = 1 << 20) -> Container:
    await client.create_sandbox()
    made = await client.create_container("box", agent.spec("/bin/sh", "-c", script))
    await client.guest.KeepLog(caisson_pb2.KeepLogRequest(container_id="box", max_bytes=max_bytes))
    await made.start()
    return made


async def kept(client: Agent, *, follow: bool = False, begin: int = 0) -> list[tuple[int, bytes]]:
    found = container_logs.entries(client, "box", follow=follow, begin=begin)
    return [(entry.stream, entry.data) async for entry in found]


async def test_a_program_does_not_stop_because_nobody_reads(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        made = await detached(agent, client, "head -c 3000000 /dev/zero; exit 7", max_bytes=200_000)
        assert await asyncio.wait_for(made.init().wait(), 60) == 7
        await kept(client, follow=True)  # while it is drained, this gets more than what is kept
        data = b"".join(data for _, data in await kept(client))
        assert 130_000 < len(data) <= 200_000, "expected the tail"


async def test_output_is_there_after_the_end_and_by_stream(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        made = await detached(agent, client, "echo one; sleep 0.1; echo two >&2; exit 3")
        assert await made.init().wait() == 3
        assert await kept(client, follow=True) == [(1, b"one\n"), (2, b"two\n")]
        assert await kept(client) == [(1, b"one\n"), (2, b"two\n")], "expected the same again"
        assert await kept(client, begin=4) == [(2, b"two\n")]


async def test_a_follower_sees_what_comes_and_ends_with_the_container(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        made = await detached(agent, client, "echo begin; read line; echo got $line")
        follower = asyncio.create_task(kept(client, follow=True))
        async for entry in container_logs.entries(client, "box", follow=True):
            assert entry.data == b"begin\n"
            break
        await made.init().write(b"it\n")
        assert b"".join(data for _, data in await asyncio.wait_for(follower, 60)) == b"begin\ngot it\n"


async def test_a_log_is_shown_from_a_moment_on_and_by_its_last_lines(
    agent: RunningAgent, capfd: pytest.CaptureFixture[str]
) -> None:
    async with agent.connect() as client:
        made = await detached(agent, client, "echo one; read line; echo two; echo three >&2; exit 3")
        async for entry in container_logs.entries(client, "box", follow=True):
            since = entry.time / 1e9 + 1e-6  # finer than a float of seconds
            break
        await made.init().write(b"\n")
        assert await made.init().wait() == 3
        await container_logs.show(client, "box", since=since)
        assert capfd.readouterr() == ("two\n", "three\n")
        await container_logs.show(client, "box", tail=2)
        assert capfd.readouterr() == ("two\n", "three\n")
        await container_logs.show(client, "box", tail=3, since=since)
        assert capfd.readouterr() == ("two\n", "three\n")
        await container_logs.show(client, "box")
        assert capfd.readouterr() == ("one\ntwo\n", "three\n")


async def test_a_log_goes_with_its_container(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        made = await detached(agent, client, "echo one")
        await made.init().wait()
        await made.remove()
        request = caisson_pb2.ReadLogRequest(container_id="box")
        assert (await refused(client.guest.ReadLog(request)))[0] is StatusCode.NOT_FOUND
        made = await detached(agent, client, "echo two")
        assert await kept(client, follow=True) == [(1, b"two\n")]


@pytest.mark.parametrize("max_bytes", [0, (16 << 20) + 1])
async def test_sizes_out_of_range_are_refused(agent: RunningAgent, max_bytes: int) -> None:
    async with agent.connect() as client:
        request = caisson_pb2.KeepLogRequest(container_id="box", max_bytes=max_bytes)
        assert (await refused(client.guest.KeepLog(request)))[0] is StatusCode.INVALID_ARGUMENT

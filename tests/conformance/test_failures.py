"""Check for fifteen failures that users of Kata agents have met.

Each test was seen to fail against an agent with the defect.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from caisson.agent.client import Agent, Container, Process
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.kata1 import agent_pb2
from tests.conformance.generations import Generation
from tests.native.agent_support import RunningAgent, errors, output, refused, sh
from tests.support.poll import until

pytestmark = pytest.mark.root


async def box(client: Agent, agent: RunningAgent, *args: str) -> Container:
    await client.create_sandbox()
    return await client.ensure_container("box", agent.spec(*args or ("/bin/sleep", "1000")))


async def rest(process: Process) -> tuple[bytes, float]:
    """Read the rest of its output, and time how long its end took."""
    began = time.monotonic()
    return await output(process), time.monotonic() - began


async def test_01_output_is_not_cut_off(agent: RunningAgent) -> None:
    """What was written before the exit is delivered, even if the process exits before the first read."""

    async with agent.connect() as client:
        container = await box(client, agent)
        for _ in range(10):
            process = await sh(container, "head -c 60000 /dev/zero; echo end")
            assert await process.wait() == 0
            assert (await output(process)) == bytes(60000) + b"end\n"


async def test_02_a_background_job_on_the_terminal_does_not_hold_the_end(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        container = await box(client, agent)
        process = await sh(container, "trap '' HUP; sleep 1000 & echo started; exit 5", terminal=True)
        said, seconds = await rest(process)
        assert said == b"started\r\n"
        assert await process.wait() == 5
        assert seconds < 10


async def test_03_a_background_job_on_the_pipes_does_not_hold_the_end(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        container = await box(client, agent)
        process = await sh(container, "tail -f /dev/null & head -c 50000 /dev/zero; exit 6")
        assert await process.wait() == 6
        said, seconds = await rest(process)
        assert said == bytes(50000)
        assert seconds < 10


async def test_04_short_output_is_never_lost(agent: RunningAgent) -> None:
    """The exit must not overtake the pending read."""

    async with agent.connect() as client:
        container = await box(client, agent)

        async def one(number: int) -> None:
            process = await sh(container, f"read go; echo {number}")
            reading = asyncio.ensure_future(output(process))
            await client.version()  # by now it is pending
            await process.close_stdin()
            assert await reading == f"{number}\n".encode()

        for start in range(0, 300, 20):
            await asyncio.gather(*map(one, range(start, start + 20)))


async def test_05_the_end_is_the_one_that_hosts_know(agent: RunningAgent, generation: Generation) -> None:
    async with agent.connect() as client:
        process = await sh(await box(client, agent), "echo x")
        request = agent_pb2.ReadStreamRequest(container_id="box", exec_id=process.exec_id, len=100)
        assert (await client.rpc.ReadStdout(request)).data == b"x\n"
        for _ in range(2):
            if generation.end_of_output is None:
                assert (await client.rpc.ReadStdout(request)).data == b""
            else:
                assert await refused(client.rpc.ReadStdout(request)) == generation.end_of_output


async def test_06_all_waiters_get_the_status(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        process = await sh(await box(client, agent), "read line; exit 7")
        waiters = [asyncio.ensure_future(process.wait()) for _ in range(10)]
        for _ in range(10):  # by now they wait
            await client.version()
        await process.close_stdin()
        assert await asyncio.gather(*waiters) == [7] * 10
        assert await process.wait() == 7


async def test_07_a_process_that_ends_at_once_is_not_missed(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        container = await box(client, agent)

        async def one() -> int:
            return await (await container.exec(["/bin/true"])).wait()

        for _ in range(10):
            assert await asyncio.gather(*(one() for _ in range(30))) == [0] * 30


async def test_08_statuses_of_hooks_are_not_lost(agent: RunningAgent, tmp_path: Path) -> None:
    """The agent's helpers are its children, too: their status belongs to whoever started them."""
    verdict = tmp_path / "verdict"
    for kind in ("prestart", "poststop"):
        hook = tmp_path / "hooks" / kind / "look"
        hook.parent.mkdir(parents=True)
        hook.write_text(f"#!/bin/sh\ncat >{tmp_path}/{kind}.state\nexit $(cat {verdict})\n")
        hook.chmod(0o755)

    async with agent.connect() as client:
        await client.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(guest_hook_path=str(tmp_path / "hooks")))
        fds = agent.fds()
        for status in ("0", "7") * 5:
            verdict.write_text(status)
            if status == "0":
                container = await client.create_container("box", agent.spec())
                assert '"id"' in (tmp_path / "prestart.state").read_text()
                await container.remove()
                assert '"stopped"' in (tmp_path / "poststop.state").read_text()
            else:
                code, text = await refused(client.create_container("box", agent.spec()))
                assert (code, "7" in text and "prestart" in text) == (Code.INTERNAL, True), text
        await until(lambda: agent.fds() == fds and not agent.children(), "nothing is left")


async def test_09_the_thousandth_exec_is_like_the_first(agent: RunningAgent) -> None:
    """A process nobody reads from, writes to or closes must not leak descriptors."""

    async with agent.connect() as client:
        container = await box(client, agent)
        fds = agent.fds()

        async def one(terminal: bool) -> None:
            process = await container.exec(["/bin/true"], terminal=terminal)
            assert await process.wait() == 0
            assert await output(process) == b""

        for _ in range(25):
            await asyncio.gather(*(one(number % 2 == 0) for number in range(40)))
        await until(lambda: agent.fds() == fds, "as many descriptors as before")


async def test_10_what_nobody_waits_for_is_not_kept_for_ever(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        container = await box(client, agent)
        fds = agent.fds()
        async with agent.connect() as other:  # a host that disappears
            container.agent = other
            processes = [await sh(container, "echo x; echo y >&2") for _ in range(50)]
        container.agent = client
        first = Process(container, processes[0].exec_id, terminal=False)
        assert await first.wait() == 0 and await output(first) == b"x\n"
        await container.remove()
        await until(lambda: agent.fds() <= fds, "all descriptors are back")


async def test_11_orphans_are_reaped(agent: RunningAgent, tmp_path: Path) -> None:
    """Orphans in the guest are reparented to the agent; those in a container, to its init."""
    hook = tmp_path / "hooks/prestart/leave"
    hook.parent.mkdir(parents=True)
    hook.write_text("#!/bin/sh\nfor i in 1 2 3 4 5; do (sleep 0.01 </dev/null >/dev/null 2>&1 &); done\n")
    hook.chmod(0o755)

    async with agent.connect() as client:
        await client.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(guest_hook_path=str(tmp_path / "hooks")))
        script = "trap '' TERM; while :; do sleep 0.1; done"
        container = await client.ensure_container("box", agent.spec("/bin/sh", "-c", script))
        await until(lambda: len(agent.children()) == 1, "orphans of the hook are reaped")
        process = await sh(container, "for i in 1 2 3 4 5; do (sleep 0.01 &) & done; wait")
        assert await process.wait() == 0
        count = "for s in /proc/[0-9]*/stat; do cat $s 2>/dev/null; done | grep -c ') Z' || true"
        while (await output(await sh(container, count))).strip() != b"0":
            pass  # its init reaps children between two sleeps
        await until(lambda: len(agent.children()) == 1, "the agent has no zombies")


async def test_12_stopping_an_init_without_a_handler_does_not_wait(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        container = await box(client, agent, "/bin/sleep", "1000")
        await container.init().signal(15)
        assert await container.init().wait() == 137
        await container.remove()
        handler = agent.spec("/bin/sh", "-c", "trap 'exit 33' TERM; echo up; while :; do sleep 0.05; done")
        asked = await client.ensure_container("asked", handler)
        assert await anext(asked.init().stdout()) == b"up\n"
        await asked.init().signal(15)
        assert await asked.init().wait() == 33


async def test_13_a_killed_process_is_128_and_its_signal(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        container = await box(client, agent)
        for number in (9, 15, 11, 6):
            process = await sh(container, "exec sleep 1000")
            await process.signal(number)
            assert await process.wait() == 128 + number


async def test_14_closing_stdin_touches_nothing_else(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        container = await box(client, agent)
        counted = await sh(container, "wc -c; echo done; echo also >&2")
        await counted.write(bytes(1000))
        for _ in range(2):
            await counted.close_stdin()
        assert await output(counted) == b"1000\ndone\n"
        assert await errors(counted) == b"also\n"
        on_terminal = await sh(container, "read line; echo got $line", terminal=True)
        await on_terminal.close_stdin()
        await on_terminal.write(b"it\n")
        assert (await output(on_terminal)).endswith(b"got it\r\n")
        for process in (counted, on_terminal):
            assert await process.wait() == 0


async def test_15_a_signal_that_comes_too_late_is_no_failure(agent: RunningAgent) -> None:
    """And if the container is stopped, the signal wakes it, instead of hanging."""

    async with agent.connect() as client:
        container = await box(client, agent)
        ended = await sh(container, "true")
        assert await ended.wait() == 0
        await ended.signal(9)
        await container.init().signal(9)
        assert await container.init().wait() == 137
        await container.signal(9)
        await container.remove()
        frozen = await client.ensure_container("frozen", agent.spec("/bin/sleep", "1000"))
        await client.rpc.PauseContainer(agent_pb2.PauseContainerRequest(container_id="frozen"))
        await frozen.init().signal(9)
        assert await frozen.init().wait() == 137

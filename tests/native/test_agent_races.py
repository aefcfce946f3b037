"""Test calls that race: simultaneous, cancelled midway, slow, and short of resources."""

from __future__ import annotations

import asyncio
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.client import Agent, AgentError, Container
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.kata1 import agent_pb2
from tests.native.agent_support import RunningAgent, output, refused, sh
from tests.support.poll import until

pytestmark = pytest.mark.root


async def hang_up_after(call: Coroutine[Any, Any, Any], seconds: float) -> bool:
    """Make a call and hang up after a while; return whether that was before it finished."""
    try:
        await asyncio.wait_for(call, seconds)
    except TimeoutError:
        return True
    except AgentError:
        pass
    return False


async def running(client: Agent, agent: RunningAgent, name: str = "box") -> Container:
    return await client.ensure_container(name, agent.spec())


async def test_a_removal_takes_hundreds_of_processes_with_it(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        fds = agent.fds()
        container = await running(client, agent)
        for _ in range(10):
            await asyncio.gather(*(container.exec(["/bin/sleep", "1000"]) for _ in range(30)))
        await container.remove()
        await until(lambda: agent.fds() <= fds and agent.children() == set(), "everything is released")


async def test_execs_that_meet_a_removal_run_or_are_refused_and_leave_nothing(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        await client.version()
        fds, chance = agent.fds(), random.Random(4)
        for _ in range(15):
            container = await running(client, agent)
            execs = [asyncio.ensure_future(container.exec(["/bin/sleep", "1000"])) for _ in range(6)]
            await asyncio.sleep(chance.random() * 0.02)
            await container.remove()
            for result in await asyncio.gather(*execs, return_exceptions=True):
                if isinstance(result, BaseException):
                    assert isinstance(result, AgentError), result
                    assert result.code in (Code.FAILED_PRECONDITION, Code.NOT_FOUND), result.details
        await until(lambda: agent.fds() <= fds and agent.children() == set(), "everything is released")


#: The command line's exec, without a VM.
COMMAND = """
import sys
from pathlib import Path
from types import SimpleNamespace
from caisson.agent.client.execute import execute
machine = SimpleNamespace(agent_socket=Path(sys.argv[1]), directory=Path("/nowhere"))
try:
    print("begins", flush=True)
    sys.exit(execute(machine, "box", ["/bin/sleep", "1000"]))
except KeyboardInterrupt:
    sys.exit(130)
"""


async def test_a_command_that_is_interrupted_at_any_moment_leaves_no_program(agent: RunningAgent) -> None:
    chance = random.Random(5)
    async with agent.connect() as client:
        await client.create_sandbox()
        await running(client, agent)
        only_init = agent.children()
        for _ in range(8):
            command = await asyncio.create_subprocess_exec(
                sys.executable, "-c", COMMAND, str(agent.socket), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
            )
            assert command.stdout is not None and await command.stdout.readline() == b"begins\n"
            await asyncio.sleep(chance.random() * 0.02)
            command.send_signal(signal.SIGINT)
            assert await command.wait() == 130
        await until(lambda: agent.children() == only_init, "no program is left")


async def test_removals_that_meet_all_succeed_or_find_nothing(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        for _ in range(5):
            container = await running(client, agent)
            for result in await asyncio.gather(*(container.remove() for _ in range(5)), return_exceptions=True):
                assert result is None or (isinstance(result, AgentError) and result.code is Code.NOT_FOUND), result


async def test_calls_broken_off_at_any_moment_leave_all_or_nothing(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        await client.version()
        fds, chance, early = agent.fds(), random.Random(7), 0
        for _ in range(30):
            early += await hang_up_after(client.create_container("box", agent.spec()), chance.random() * 0.03)
            try:
                await client.create_container("box", agent.spec())  # the id is free, or the container exists
            except AgentError as error:
                assert error.code is Code.ALREADY_EXISTS, error.details
            container = client.container("box")
            early += await hang_up_after(container.start(), chance.random() * 0.004)
            try:
                await container.start()
            except AgentError as error:
                assert error.details == "Container box status running, should be created"
            assert await output(await container.exec(["/bin/echo", "alive"])) == b"alive\n"
            early += await hang_up_after(container.exec(["/bin/sleep", "1000"]), chance.random() * 0.01)
            early += await hang_up_after(container.remove(), chance.random() * 0.02)
            try:
                await container.remove()
            except AgentError as error:
                assert error.code is Code.NOT_FOUND, error.details
        assert early > 20
        await until(lambda: agent.fds() <= fds and agent.children() == set(), "everything is released")
        assert [path.name for path in (agent.state / "sandbox").iterdir()] == [".namespaces"]


async def test_an_end_of_the_sandbox_that_is_broken_off_comes_all_the_same(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        for number in range(5):
            await running(client, agent, f"c{number}")
        await hang_up_after(client.destroy_sandbox(), 0.001)
        await client.destroy_sandbox()
        assert list(agent.state.iterdir()) == []
        assert agent.children() == set()


async def test_processes_that_end_at_once_are_not_missed(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container, turns = await running(client, agent), asyncio.Semaphore(40)

        async def one() -> int:
            async with turns:
                process = await container.exec(["/bin/true"])
                assert await output(process) == b""
                return await process.wait()

        assert await asyncio.gather(*(one() for _ in range(400))) == [0] * 400


async def test_a_hundred_containers_at_a_time(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        fds, turns = agent.fds(), asyncio.Semaphore(20)

        async def one(number: int) -> None:
            async with turns:
                container = await running(client, agent, f"c{number}")
                assert await output(await sh(container, f"echo {number}")) == f"{number}\n".encode()
                await container.remove()

        await asyncio.gather(*(one(number) for number in range(100)))
        await until(lambda: agent.fds() <= fds and agent.children() == set(), "everything is released")


async def test_a_wait_may_come_before_the_start(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.create_container("box", agent.spec("/bin/sh", "-c", "exit 9"))
        wait = asyncio.ensure_future(container.init().wait())
        read = asyncio.ensure_future(output(container.init()))
        await client.version()
        assert not wait.done()
        await container.start()
        assert (await wait, await read) == (9, b"")


async def test_one_that_does_not_read_does_not_hold_up_others(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await running(client, agent)
        deaf = await container.exec(["/bin/sleep", "1000"])
        write = asyncio.ensure_future(deaf.write(bytes(3 << 20)))
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(deaf.wait()) for _ in range(50)]
        waits += [asyncio.ensure_future(anext(deaf.stdout())) for _ in range(50)]
        for name in ("box", "other"):
            process = await sh(await running(client, agent, name), "cat")
            await process.write(b"through\n")
            await process.close_stdin()
            assert await output(process) == b"through\n"
        assert not write.done()
        await deaf.signal(9)
        code, text = await refused(_ended(write))
        assert (code, text) == (Code.UNKNOWN, "write |1: broken pipe")
        assert await asyncio.gather(*waits[:50]) == [137] * 50
        await asyncio.gather(*waits[50:], return_exceptions=True)


async def _ended(task: asyncio.Future[Any]) -> Any:
    return await task


async def test_a_lack_of_descriptors_is_said_and_passes(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        await client.version()
        fds = agent.fds()
        _, hard = resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (fds + 60, hard))
        container = await running(client, agent)
        code, text, fine = Code.OK, "", 0
        while code is Code.OK:
            try:
                await container.exec(["/bin/sleep", "1000"])
                fine += 1
            except AgentError as error:
                code, text = error.code, error.details
        assert (code, text) == (Code.RESOURCE_EXHAUSTED, "the guest has no more of it: Too many open files")
        assert 5 < fine < 30
        await container.remove()
        assert await output(await (await running(client, agent)).exec(["/bin/echo", "again"])) == b"again\n"


async def test_the_agents_limit_is_not_the_containers(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        soft, hard = resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE)
        inherited = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == hard  # without CAP_SYS_RESOURCE it goes no higher
        assert hard in (int(Path("/proc/sys/fs/nr_open").read_text()), inherited[1])
        container = await running(client, agent)
        seen = (await output(await sh(container, "ulimit -Sn; ulimit -Hn"))).decode().split()
        assert seen == [str(inherited[0]), str(min(hard, max(inherited[1], 1 << 19)))]


@pytest.mark.parametrize("name", ["old", ".namespaces"])
async def test_state_of_an_earlier_agent_is_neither_used_nor_deleted(agent: RunningAgent, name: str) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        place = agent.state / "sandbox" / name
        place.mkdir(exist_ok=True)
        code, text = await refused(client.create_container(name, agent.spec()))
        assert (code, text) == (Code.ALREADY_EXISTS, f"container with id exists: {name}")
        assert place.is_dir()
        if name == "old":
            await client.destroy_sandbox()
            assert place.is_dir()
            place.rmdir()
            place.parent.rmdir()


#: Methods for which an empty request is like any other.
EMPTY_REQUESTS = (
    "DestroySandbox", "GetGuestDetails", "ListInterfaces", "ListRoutes", "StartTracing", "StopTracing",
)  # fmt: skip


async def test_bytes_that_are_no_request_get_a_status(agent: RunningAgent) -> None:
    chance = random.Random(5)
    garbage = [b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xfe", chance.randbytes(1000)]
    methods = {method.name for method in agent_pb2.DESCRIPTOR.services_by_name["AgentService"].methods}
    # Garbage in unknown fields is an empty request, and these would do to this machine what it says, or wait.
    methods -= {"SetGuestDateTime", "OnlineCPUMem", "MemHotplugByProbe", "ReseedRandomDev", "GetOOMEvent"}

    async with agent.connect() as client:
        for method in sorted(methods):
            for data in garbage:
                try:
                    await client.channel.call("grpc.AgentService", method, data, 20)
                    # unknown fields are not an error
                    assert method in EMPTY_REQUESTS, (method, data)
                except AgentError as error:
                    assert "calling application" not in error.details, (method, data)
                    assert "<class" not in error.details, (method, data)
                    assert error.code is not Code.INTERNAL, (method, data, error.details)
        with pytest.raises(AgentError) as caught:
            await client.channel.call("grpc.AgentService", "CreateContainer", bytes(5 << 20), 20)
        assert caught.value.code is Code.RESOURCE_EXHAUSTED
    async with agent.connect() as client:
        assert await client.version()


async def test_told_to_stop_in_the_middle_of_everything(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        calls: list[asyncio.Future[Any]] = []
        for number in range(3):
            container = await running(client, agent, f"c{number}")
            for _ in range(3):
                process = await sh(container, "trap '' TERM; yes")
                calls += [asyncio.ensure_future(process.wait()), asyncio.ensure_future(anext(process.stderr()))]
        calls += [asyncio.ensure_future(client.create_container(f"n{n}", agent.spec())) for n in range(5)]
        await asyncio.sleep(0.01)
        agent.process.terminate()
        assert await asyncio.to_thread(agent.process.wait, 30) == 0
        await asyncio.gather(*calls, return_exceptions=True)
        assert not agent.cgroups()

"""Test the call that creates or finds a running container (caisson.Guest)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from caisson.agent.client.errors import ContainerUnavailable
from caisson.agent.client.execute import execute
from caisson.agent.client.specs import container_document
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.caisson import caisson_pb2
from tests.native.agent_support import RunningAgent, output, refused, sh

pytestmark = pytest.mark.root


def methods(agent: RunningAgent) -> list[str]:
    """Return the methods that were answered, in order."""
    lines = map(json.loads, agent.log.read_text().splitlines())
    return [line["method"] for line in lines if line.get("msg") == "request"]


async def test_a_container_is_made_once_and_with_it_the_sandbox(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        spec = agent.spec("/bin/sleep", "1000").SerializeToString()
        request = caisson_pb2.EnsureRunningRequest(container_id="box", spec=spec)
        assert (await client.guest.EnsureRunning(request)).created
        assert not (await client.guest.EnsureRunning(request)).created
        assert await output(await sh(client.container("box"), "echo runs")) == b"runs\n"
        request.spec = b"\xff"  # not parsed
        assert not (await client.guest.EnsureRunning(request)).created


async def test_a_container_that_was_created_is_started_and_one_that_has_ended_is_replaced(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        made = await client.create_container("box", agent.spec("/bin/sh", "-c", "read line; exit 3"))
        spec = agent.spec("/bin/sleep", "1000").SerializeToString()
        request = caisson_pb2.EnsureRunningRequest(container_id="box", spec=spec)
        assert not (await client.guest.EnsureRunning(request)).created
        await made.init().close_stdin()
        assert await made.init().wait() in (1, 3)
        assert (await client.guest.EnsureRunning(request)).created
        assert await output(await sh(client.container("box"), "echo again")) == b"again\n"


async def test_many_callers_at_once_get_the_same_container(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        spec = agent.spec("/bin/sleep", "1000").SerializeToString()
        request = caisson_pb2.EnsureRunningRequest(container_id="box", spec=spec)
        answers = await asyncio.gather(*(client.guest.EnsureRunning(request) for _ in range(20)))
        assert sum(answer.created for answer in answers) == 1


@pytest.mark.parametrize(
    ("container_id", "spec", "code"),
    [
        ("box", b"\xff", Code.INVALID_ARGUMENT),
        ("box", b"", Code.INVALID_ARGUMENT),
        ("../x", b"", Code.INVALID_ARGUMENT),
    ],
)
async def test_what_cannot_be_made_leaves_nothing(
    agent: RunningAgent, container_id: str, spec: bytes, code: Code
) -> None:
    async with agent.connect() as client:
        request = caisson_pb2.EnsureRunningRequest(container_id=container_id, spec=spec)
        assert (await refused(client.guest.EnsureRunning(request)))[0] is code
        await client.ensure_container("box", agent.spec())


class Machine:
    """A command's view of a VM."""

    def __init__(self, agent: RunningAgent, directory: Path) -> None:
        self.agent_socket = agent.socket
        self.directory = directory
        (directory / "image.json").write_text(json.dumps({"containers": {"busybox": str(agent.rootfs)}}))


def test_an_exec_makes_two_calls_before_the_program_runs(agent: RunningAgent, tmp_path: Path) -> None:
    machine = Machine(agent, tmp_path)
    for place in ("tmp", "run", "root", "home", "var"):
        (agent.rootfs / place).mkdir(exist_ok=True)
    assert execute(machine, "default", ["/bin/true"]) == 0
    before = len(methods(agent))
    assert execute(machine, "default", ["/bin/true"]) == 0
    later = [name for name in methods(agent)[before:] if name != "CloseStdin"]  # the first exec's may still arrive
    assert later[0] == "ExecProcess" and "EnsureRunning" not in later


def test_an_exec_makes_no_container_but_the_default_one(agent: RunningAgent, tmp_path: Path) -> None:
    machine = Machine(agent, tmp_path)
    with pytest.raises(ContainerUnavailable, match="container web: does not exist"):
        execute(machine, "web", ["/bin/true"])

    async def make_one_that_ends() -> None:
        async with agent.connect() as client:
            made = await client.create_container("done", agent.spec("/bin/true"))
            await made.start()
            await made.init().wait()

    asyncio.run(with_sandbox(agent))
    asyncio.run(make_one_that_ends())
    with pytest.raises(ContainerUnavailable, match="container done has exited"):
        execute(machine, "done", ["/bin/true"])


async def with_sandbox(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()


async def test_words_are_bytes(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        document = container_document(str(agent.rootfs), ["/bin/printf", "%s", "a\udcffb"], scratch=())
        made = await client.create_container("box", document)
        await made.start()
        assert await output(made.init()) == b"a\xffb"
        await made.remove()
        running = await client.ensure_container("run", container_document(str(agent.rootfs), scratch=()))
        process = await running.exec(["/bin/sh", "-c", 'printf %s "$X$0"', "\udcfe"], env=["X=\udcfd"])
        assert await output(process) == b"\xfd\xfe"


async def test_a_terminal_has_its_size_from_the_beginning(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        running = await client.ensure_container("run", container_document(str(agent.rootfs), scratch=()))
        for _ in range(6):
            process = await running.exec(["/bin/stty", "size"], terminal=True, size=(37, 111))
            assert await output(process) == b"37 111\r\n"


async def test_fields_that_mean_nothing_are_warned_of(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        document = container_document(str(agent.rootfs), ["/bin/true"], scratch=()) | {"nonsense": 1}
        (warning,) = await client.create_container_reporting("box", document)
        assert "nonsense" in warning

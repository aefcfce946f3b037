"""Check rules of the API that no other file covers: unusual call orders of hosts, and what hosts may rely on."""

from __future__ import annotations

import asyncio
import time

import pytest

from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.kata1 import agent_pb2, oci_pb2
from tests.conformance.generations import Generation
from tests.native.agent_support import RunningAgent, output, refused, sh

pytestmark = pytest.mark.root


async def test_a_start_comes_once(agent: RunningAgent, generation: Generation) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.create_container("box", agent.spec("/bin/sleep", "1000"))
        await container.start()
        assert await refused(container.start()) == generation.start_running
        dead = await client.create_container("dead", agent.spec("/bin/sleep", "1000"))
        await dead.signal(9)
        assert await dead.init().wait() == 137
        assert await refused(dead.start()) == generation.start_stopped
        assert await refused(dead.exec(["/bin/true"])) == generation.exec_stopped


async def test_an_exec_into_one_that_is_not_started(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.create_container("box", agent.spec("/bin/sleep", "1000"))
        assert await (await container.exec(["/bin/true"])).wait() == 0
        await container.start()


async def test_an_exec_has_the_containers_rights_but_for_capabilities(
    agent: RunningAgent, generation: Generation
) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        spec = agent.spec("/bin/sleep", "1000")
        spec.Process.Capabilities.CopyFrom(oci_pb2.LinuxCapabilities(Bounding=["CAP_KILL"], Permitted=["CAP_KILL"]))
        await client.ensure_container("box", spec)
        every = ["CAP_SYS_ADMIN", "CAP_KILL"]
        process = oci_pb2.Process(
            Args=["/bin/sh", "-c", "grep -E '^(CapPrm|CapBnd|NoNewPrivs)' /proc/self/status"],
            Env=["PATH=/bin"],
            Cwd="/",
            Capabilities=oci_pb2.LinuxCapabilities(Bounding=every, Permitted=every, Effective=every),
            NoNewPrivileges=False,
        )
        request = agent_pb2.ExecProcessRequest(container_id="box", exec_id="x", process=process)
        await client.rpc.ExecProcess(request)
        read = agent_pb2.ReadStreamRequest(container_id="box", exec_id="x", len=4096)
        seen = (await client.rpc.ReadStdout(read)).data.decode().split()
        has = f"{1 << 5 | (1 << 21 if generation.exec_has_capabilities else 0):016x}"
        assert seen == ["CapPrm:", has, "CapBnd:", has, "NoNewPrivs:", "1"]


@pytest.mark.parametrize(
    "args, text",
    [
        (["missing"], 'exec: "missing": executable file not found in $PATH'),
        (["/missing"], 'exec: "/missing": stat /missing: no such file or directory'),
        (["/etc"], 'exec: "/etc": is a directory'),
        (["/file"], 'exec: "/file": permission denied'),
    ],
)
async def test_a_program_that_is_none_is_told_at_once(agent: RunningAgent, args: list[str], text: str) -> None:
    (agent.rootfs / "etc").mkdir(exist_ok=True)
    (agent.rootfs / "file").touch(mode=0o600)

    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec("/bin/sleep", "1000"))
        began = time.monotonic()
        assert await refused(container.exec(args, env=["PATH=/bin"])) == (
            Code.INTERNAL,
            f"Could not run process: {text}",
        )
        assert time.monotonic() - began < 5


async def test_a_status_is_there_for_whoever_comes_later(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.create_container("box", agent.spec("/bin/sh", "-c", "exit 7"))
        waiting = asyncio.ensure_future(container.init().wait())  # before it starts
        await client.version()
        await container.start()
        assert await waiting == 7
        for _ in range(2):
            assert await container.init().wait() == 7


async def test_a_megabyte_of_input_and_what_comes_after_its_end(agent: RunningAgent, generation: Generation) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec("/bin/sleep", "1000"))
        process = await sh(container, "cat | wc -c")
        for _ in range(8):
            await process.write(bytes(128 << 10))
        await process.close_stdin()
        late = agent_pb2.WriteStreamRequest(container_id="box", exec_id=process.exec_id, data=b"late")
        answer = None
        try:
            answer = (await client.rpc.WriteStdin(late)).len
        except Exception as error:
            assert "broken pipe" in str(error)
        assert answer in (None, 0)
        assert await output(process) == b"1048576\n"
        resize = agent_pb2.TtyWinResizeRequest(container_id="box", exec_id=process.exec_id, row=1, column=1)
        assert await refused(client.rpc.TtyWinResize(resize)) == generation.no_terminal


async def test_a_thousand_at_once_that_end_at_once(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec())
        gate = asyncio.Semaphore(100)

        async def one() -> int:
            async with gate:
                return await (await container.exec(["/bin/true"])).wait()

        assert await asyncio.gather(*(one() for _ in range(1000))) == [0] * 1000

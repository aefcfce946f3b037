"""Test the client's connections, by gRPC and ttrpc, to an agent that is slow, goes away, or refuses."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
from google.protobuf import empty_pb2

from caisson.agent.api.kata3 import status as kata3
from caisson.agent.api.reasons import detail_of
from caisson.agent.base import errors
from caisson.agent.base.log import Log
from caisson.agent.base.tracing import Tracing
from caisson.agent.client import (
    Agent,
    AgentError,
    AgentGone,
    ProgramError,
    ReadinessProbe,
    Reason,
    UsageError,
    foreground,
    is_serving,
)
from caisson.agent.client.forward import dial
from caisson.agent.libcontainer.errors import launch_error
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.dispatch import Dispatch, Method
from caisson.agent.rpc.listener import accept, listen
from caisson.agent.rpc.server import Server
from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata3 import agent_pb2, health_pb2
from tests.support.poll import until

Protocol = Literal["grpc", "ttrpc"]

#: Seconds until an agent's first response: more than the client's longest pause between two attempts.
RESPONSE_DELAY = 1.5


class FakeAgent:
    """Answers Health, and a few methods as a test requires."""

    def __init__(self) -> None:
        self.raised: Exception = errors.ContainerNotFound(container_id="box")
        self.output: asyncio.Queue[bytes] = asyncio.Queue()
        self.input: asyncio.Queue[bytes] = asyncio.Queue()
        self.taken = asyncio.Semaphore(0)
        self.closed = asyncio.Event()
        self.methods = {
            "/grpc.Health/Check": Method("Check", health_pb2.CheckRequest, self.check),
            "/grpc.Health/Version": Method("Version", health_pb2.CheckRequest, self.version),
            "/grpc.AgentService/PauseContainer": Method("Pause", agent_pb2.PauseContainerRequest, self.refuse),
            "/grpc.AgentService/ReadStdout": Method("ReadStdout", agent_pb2.ReadStreamRequest, self.read),
            "/grpc.AgentService/WriteStdin": Method("WriteStdin", agent_pb2.WriteStreamRequest, self.write),
            "/grpc.AgentService/CloseStdin": Method("CloseStdin", agent_pb2.CloseStdinRequest, self.close_stdin),
        }

    async def check(self, request: Any) -> Any:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def version(self, request: Any) -> Any:
        return health_pb2.VersionCheckResponse(agent_version="slow")

    async def refuse(self, request: Any) -> Any:
        raise self.raised

    async def read(self, request: Any) -> Any:
        return agent_pb2.ReadStreamResponse(data=await self.output.get())

    async def write(self, request: Any) -> Any:
        self.input.put_nowait(request.data)
        await self.taken.acquire()
        return agent_pb2.WriteStreamResponse(len=len(request.data))

    async def close_stdin(self, request: Any) -> Any:
        self.closed.set()
        return empty_pb2.Empty()


@contextlib.asynccontextmanager
async def serving(path: Path, agent: FakeAgent) -> AsyncIterator[Server]:
    log = Log("fatal")
    dispatch = Dispatch(agent.methods, log, Tracing(""), kata3.status_of, detail_of=detail_of)
    server = Server(log, grpc=dispatch, ttrpc=dispatch)
    listener = listen(f"unix:{path}")
    task = asyncio.ensure_future(accept(listener, server.accept, log))
    yield server
    task.cancel()
    await asyncio.wait([task])
    await server.stop(grace=1)
    listener.close()
    path.unlink()


async def _carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        target.write(data)
    target.close()


@pytest.mark.parametrize("protocol", ["grpc", "ttrpc"])
async def test_an_agent_that_is_slow_to_answer_is_waited_for(tmp_path: Path, protocol: Protocol) -> None:
    """In a busy guest without KVM, a client that heard nothing for half a second after connecting reported no agent."""
    attempts = 0

    async def delayed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(RESPONSE_DELAY)  # what this test is about
        inner, outer = await asyncio.open_unix_connection(str(tmp_path / "server"))
        await asyncio.gather(_carry(reader, outer), _carry(inner, writer), return_exceptions=True)

    async with serving(tmp_path / "server", FakeAgent()):
        relay = await asyncio.start_unix_server(delayed, tmp_path / "agent.sock")
        async with Agent.connect(tmp_path / "agent.sock", protocol) as agent:
            assert await agent.version() == "slow"
        relay.close()
    assert attempts == 1


async def test_a_guests_first_answer_comes_on_the_first_connection_that_the_guest_takes(tmp_path: Path) -> None:
    """A starting guest refuses, then leaves the request waiting, then answers it: it is sent once, and not repeated."""
    attempts = 0
    refusing, started = 3, asyncio.Event()

    async def starting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        if attempts <= refusing:
            writer.close()
            return
        await started.wait()
        inner, outer = await asyncio.open_unix_connection(str(tmp_path / "server"))
        await asyncio.gather(_carry(reader, outer), _carry(inner, writer), return_exceptions=True)

    async with serving(tmp_path / "server", FakeAgent()):
        ready, told = ReadinessProbe(timeout=0.2), []
        told.append(await asyncio.to_thread(ready, tmp_path / "agent.sock"))  # nothing is listening yet
        guest = await asyncio.start_unix_server(starting, tmp_path / "agent.sock")
        while attempts <= refusing:
            told.append(await asyncio.to_thread(ready, tmp_path / "agent.sock"))
        told.append(await asyncio.to_thread(ready, tmp_path / "agent.sock"))
        started.set()
        while not told[-1]:
            told.append(await asyncio.to_thread(ready, tmp_path / "agent.sock"))
        guest.close()
        assert told[-1] and not any(told[:-1])
        assert attempts == refusing + 1
        assert await asyncio.to_thread(is_serving, tmp_path / "server", 5.0)
    assert not await asyncio.to_thread(is_serving, tmp_path / "server", 0.05)


@pytest.mark.parametrize("protocol", ["grpc", "ttrpc"])
async def test_a_lost_agent_is_reported_in_words_of_its_own_and_connected_to_again(
    tmp_path: Path, protocol: Protocol
) -> None:
    path = tmp_path / "agent.sock"
    async with Agent.connect(path, protocol) as agent:
        with pytest.raises(AgentGone, match=r"^agent: does not answer \([a-z ]+\); `caisson list-vms` shows"):
            await agent.version()
        async with serving(path, FakeAgent()):
            async with asyncio.timeout(20):
                while True:
                    with contextlib.suppress(AgentGone):  # gRPC pauses between two attempts
                        assert await agent.version() == "slow"
                        break
                    await asyncio.sleep(0.02)
        with pytest.raises(AgentGone, match=r"^agent: does not answer"):
            await agent.version()


@pytest.mark.parametrize(
    ("raised", "kind", "code", "details", "reason", "text"),
    [
        (
            errors.ContainerNotFound(container_id="box"), AgentError, StatusCode.INVALID_ARGUMENT,
            "invalid container id", Reason.CONTAINER_NOT_FOUND, "container box: not found",
        ),
        (
            errors.CannotExec(container_id="box", status="paused"), AgentError, StatusCode.FAILED_PRECONDITION,
            "container box: cannot run another process: it is paused", Reason.CONTAINER_PAUSED,
            "container box: cannot run another process: it is paused",
        ),
        (
            launch_error("lookup", "nothing", 2, "path"), ProgramError, StatusCode.INTERNAL,
            'Could not run process: exec: "nothing": executable file not found in $PATH', Reason.PROGRAM_NOT_FOUND,
            'Could not run process: exec: "nothing": executable file not found in $PATH',
        ),
        (
            launch_error("lookup", "/etc", 13, ""), ProgramError, StatusCode.INTERNAL,
            'Could not run process: exec: "/etc": permission denied', Reason.PROGRAM_NOT_EXECUTABLE,
            'Could not run process: exec: "/etc": permission denied',
        ),
        (errors.ModelError("\udcff"), AgentError, StatusCode.INTERNAL, "\\udcff", Reason.UNSPECIFIED, "\\udcff"),
    ],
)  # fmt: skip
async def test_an_error_has_its_reason_and_a_sentence_beside_what_kata_hosts_are_told(
    tmp_path: Path, raised: Exception, kind: type, code: StatusCode, details: str, reason: Reason, text: str
) -> None:
    fake = FakeAgent()
    fake.raised = raised
    async with serving(tmp_path / "s", fake), Agent.connect(tmp_path / "s", "ttrpc") as agent:
        with pytest.raises(AgentError) as caught:
            await agent.container("box").pause()
    error = caught.value
    assert (type(error), error.code, error.details, error.reason, str(error)) == (kind, code, details, reason, text)


async def test_output_of_a_read_that_was_given_up_goes_to_the_next_one(tmp_path: Path) -> None:
    """ttrpc cannot cancel a call: data that the agent has already taken from the pipe must not be lost."""
    fake = FakeAgent()
    async with serving(tmp_path / "s", fake), Agent.connect(tmp_path / "s", "ttrpc") as agent:
        process = agent.container("box").init()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(process.stdout()), 0.05)
        fake.output.put_nowait(b"first")
        assert await anext(process.stdout()) == b"first"
        fake.output.put_nowait(b"")
        assert [data async for data in process.stdout()] == []


@pytest.mark.parametrize(("protocol", "ahead"), [("ttrpc", 2), ("grpc", 1)])
async def test_input_is_sent_ahead_where_calls_keep_their_order(tmp_path: Path, protocol: Protocol, ahead: int) -> None:
    """Over gRPC a short piece would overtake a long one."""
    fake = FakeAgent()
    asked: list[int] = []

    async def pieces() -> AsyncIterator[bytes]:
        for number in range(6):
            asked.append(number)
            yield bytes([number]) * (1 << 18 if number % 2 else 1)

    async with serving(tmp_path / "s", fake), Agent.connect(tmp_path / "s", protocol) as agent:
        feeding = asyncio.create_task(agent.container("box").init().feed(pieces()))
        for number in range(6):
            assert (await asyncio.wait_for(fake.input.get(), 10))[:1] == bytes([number])
            await until(partial(_has, asked, min(number + ahead, 6)), found=lambda: asked)
            fake.taken.release()
        await asyncio.wait_for(feeding, 10)
        assert fake.closed.is_set()


def _has(pieces: list[int], count: int) -> bool:
    return len(pieces) == count


async def test_a_request_that_ttrpc_cannot_carry_is_refused_here(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", FakeAgent()), Agent.connect(tmp_path / "s", "ttrpc") as agent:
        with pytest.raises(AgentError) as caught:
            await agent.container("b" * (5 << 20)).pause()
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        assert await agent.version() == "slow"


def test_the_client_imports_grpc_for_grpc_alone() -> None:
    code = """if True:
        import sys
        from caisson.agent import client
        from caisson.agent.client import foreground, guest
        client.Agent.connect("/nowhere", "ttrpc")
        assert not {"grpc", "caisson.proto.kata1.agent_pb2"} & set(sys.modules), sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reasons_are_the_protocols() -> None:
    enum = caisson_pb2.DESCRIPTOR.enum_types_by_name["Reason"]
    assert {one.name: int(one) for one in Reason} == {value.name: value.number for value in enum.values}


async def test_a_vsock_port_that_answers_a_line_without_end_is_refused(tmp_path: Path) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"OK " + bytes(1 << 20))

    async with await asyncio.start_unix_server(answer, tmp_path / "vsock.sock"):
        with pytest.raises(UsageError, match="vsock port 5: nothing listens there"):
            await dial(tmp_path / "vsock.sock", 5)


async def test_memory_events_of_other_containers_are_read_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def next_event(request: agent_pb2.GetOOMEventRequest, timeout: float) -> agent_pb2.OOMEvent:
        await asyncio.sleep(0)
        return agent_pb2.OOMEvent(container_id="other")

    monkeypatch.setattr(foreground, "OOM_TIMEOUT", 0.05)
    agent: Any = mock.Mock(rpc=mock.Mock(GetOOMEvent=next_event))
    assert not await foreground._out_of_memory(agent, "box")
    assert await foreground._out_of_memory(agent, "other")

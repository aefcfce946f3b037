"""Replay `docker exec -it` as a Kata 1.x host sends it to the agent, call by call as recorded.

The host writes typed input one byte at a time, and sends SIGURG (23) after each: the Go runtime of its client uses that
signal itself, and forwards every one it gets.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from caisson.agent.client import Agent, AgentError
from caisson.proto.kata1 import agent_pb2, oci_pb2
from tests.conformance.generations import Generation
from tests.native.agent_support import RunningAgent

pytestmark = pytest.mark.root

SIGURG = 23
LEN = 32 << 10
KEY: dict[str, Any] = {"container_id": "c", "exec_id": "e"}


class Terminal:
    """The host's side of the output: one read is always pending, and its results are kept."""

    def __init__(self, client: Agent) -> None:
        self.seen = b""
        self.end: AgentError | bytes | None = None
        self._changed = asyncio.Event()
        self.task = asyncio.ensure_future(self._read(client))

    async def _read(self, client: Agent) -> None:
        while self.end is None:
            try:
                data = (await client.rpc.ReadStdout(agent_pb2.ReadStreamRequest(len=LEN, **KEY))).data
                self.seen += data
                if not data:
                    self.end = data
            except AgentError as error:
                self.end = error
            self._changed.set()

    async def until(self, text: bytes, start: int = 0) -> None:
        """Wait for a text after the position already seen."""
        while text not in self.seen[start:]:
            assert self.end is None, (self.seen, self.end)
            self._changed.clear()
            await self._changed.wait()


async def test_the_recorded_conversation(agent: RunningAgent, generation: Generation) -> None:
    async with agent.connect() as client:
        rpc = client.rpc
        await client.create_sandbox()
        container = await client.ensure_container("c", agent.spec("/bin/sleep", "1000"))
        fds, children = agent.fds(), agent.children()

        process = oci_pb2.Process(
            Terminal=True,
            Args=["/bin/sh"],
            Env=["PATH=/bin", "TERM=xterm", "PS1=$ "],
            Cwd="/",
            User=oci_pb2.User(UID=0, GID=0),
        )
        await rpc.ExecProcess(agent_pb2.ExecProcessRequest(process=process, **KEY))
        terminal = Terminal(client)
        await rpc.TtyWinResize(agent_pb2.TtyWinResizeRequest(row=50, column=132, **KEY))
        await terminal.until(b"$ ")

        async def type_in(text: bytes) -> None:
            for byte in text:
                before = len(terminal.seen)
                written = await rpc.WriteStdin(agent_pb2.WriteStreamRequest(data=bytes([byte]), **KEY))
                assert written.len == 1
                await rpc.SignalProcess(agent_pb2.SignalProcessRequest(signal=SIGURG, **KEY))
                await terminal.until(b"\r\n" if byte == ord("\r") else bytes([byte]), before)  # its echo

        await type_in(b"stty size; echo $((6 * 7)) >&2\r")
        await terminal.until(b"\r\n42\r\n")
        assert b"stty size; echo $((6 * 7)) >&2\r\n50 132\r\n42\r\n" in terminal.seen
        await type_in(b"exit")
        await rpc.WriteStdin(agent_pb2.WriteStreamRequest(data=b"\r", **KEY))
        await terminal.task
        if generation.end_of_output is None:
            assert terminal.end == b""
        else:
            assert isinstance(terminal.end, AgentError)
            assert (terminal.end.code, terminal.end.details) == generation.end_of_output
        assert (await rpc.WaitProcess(agent_pb2.WaitProcessRequest(**KEY))).status == 0
        assert agent.children() == children
        assert agent.fds() == fds

        await container.remove()
        with pytest.raises(AgentError) as caught:
            await rpc.WaitProcess(agent_pb2.WaitProcessRequest(**KEY))
        assert caught.value.code is generation.container_not_found[0]

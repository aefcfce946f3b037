"""A process of a container as containerd sees it: created, running, stopped; with its streams and its exit status."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.responses import ConnectionClosed, RpcError
from caisson.agent.shim.bundle import KILLED
from caisson.agent.shim.errors import ShimError, finished
from caisson.agent.shim.stdio import BLOCK, StdinReader, TaskStreams, copy_output
from caisson.proto.containerd import tasks_pb2
from caisson.proto.kata3 import agent_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds that Delete waits for output to be copied, and for the agent to accept input.
DRAIN_TIMEOUT = 10.0

CREATED, RUNNING, STOPPED = tasks_pb2.CREATED, tasks_pb2.RUNNING, tasks_pb2.STOPPED


class Process:
    """The init process of a container, or one added by Exec."""

    def __init__(self, rpc: Any, container_id: str, exec_id: str, guest_id: str, request: Any, namespace: str) -> None:
        """``exec_id`` is containerd's, empty for init; ``guest_id`` the agent's; ``request`` has the streams."""
        self.exec_id = exec_id
        self.stdin, self.stdout, self.stderr = str(request.stdin), str(request.stdout), str(request.stderr)
        self.terminal = bool(request.terminal)
        self.status = CREATED
        self.exit_status = 0
        self.exited_at = 0  # nanoseconds since the epoch
        self.exited = asyncio.Event()
        self.spec: dict[str, Any] = {}  # for one added by Exec
        self._rpc = rpc
        self._container_id = container_id
        self._ids: dict[str, Any] = {"container_id": container_id, "exec_id": guest_id}
        self._namespace = namespace
        self._streams: TaskStreams | None = None
        self._copies: list[asyncio.Task[None]] = []
        self._input: asyncio.Task[None] | None = None

    @property
    def ids(self) -> dict[str, Any]:
        """Its ids in the agent's API."""
        return self._ids

    async def open(self) -> None:
        """Open its streams.  Raises ShimError."""
        try:
            self._streams = await TaskStreams.open(
                self.stdin, self.stdout, self.stderr, self._container_id, self._namespace
            )
        except TimeoutError as error:
            raise ShimError(StatusCode.UNKNOWN, str(error)) from error
        except OSError as error:
            what = error.filename or self.stdout
            raise ShimError(StatusCode.UNKNOWN, f"{what}: {(error.strerror or '').lower()}") from error

    def started(self, ended: Callable[[Process], Any]) -> None:
        """Record that it is running, copy its streams, and call ``ended`` when it has exited."""
        self.status = RUNNING
        loop = asyncio.get_running_loop()
        streams = self._streams
        assert streams is not None, "open() comes first"
        self._copies = [loop.create_task(copy_output(lambda: self._read("ReadStdout"), streams.stdout))]
        if not self.terminal:
            self._copies.append(loop.create_task(copy_output(lambda: self._read("ReadStderr"), streams.stderr)))
        if streams.stdin is not None or not self.terminal:
            self._input = loop.create_task(self._copy_input(streams.stdin))
        self._waiting = loop.create_task(self._wait(ended))

    async def _wait(self, ended: Callable[[Process], Any]) -> None:
        try:
            answer = await self._rpc.WaitProcess(agent_pb2.WaitProcessRequest(**self._ids))
            status = int(answer.status) & 0xFF  # do not trust the guest's value
        except RpcError:
            status = KILLED  # the VM has exited, and the process with it
        await self.end(status)
        await ended(self)

    async def end(self, status: int) -> None:
        """Record that it has exited; its own output is copied first, unless nobody reads it."""
        if self._copies:
            await asyncio.wait(self._copies, timeout=0.5)
        self.status, self.exit_status, self.exited_at = STOPPED, status, time.time_ns()

    async def _read(self, method: str) -> bytes:
        try:
            answer = await getattr(self._rpc, method)(agent_pb2.ReadStreamRequest(**self._ids, len=BLOCK))
        except RpcError:
            return b""
        return bytes(answer.data)

    async def _copy_input(self, stdin: StdinReader | None) -> None:
        """Copy its input until that ends; without any, its stdin ends at once."""
        if stdin is not None:
            try:
                stdin.open()
            except OSError:
                stdin = None  # its client is gone
        try:
            while stdin is not None and (data := await stdin.read()):
                while data:
                    answer = await self._rpc.WriteStdin(agent_pb2.WriteStreamRequest(**self._ids, data=data))
                    data = data[answer.len or len(data) :]
            await self._rpc.CloseStdin(agent_pb2.CloseStdinRequest(**self._ids))
        except (OSError, RpcError):
            pass  # it has exited, or closed its stdin

    def close_input(self) -> None:
        """Close its stdin once queued input has been read."""
        if self._streams is not None and self._streams.stdin is not None:
            self._streams.stdin.close_input()

    async def close(self) -> None:
        """Close its streams, when all output is copied or DRAIN_TIMEOUT has passed."""
        if self._copies:
            await asyncio.wait(self._copies, timeout=DRAIN_TIMEOUT)
        tasks = [*self._copies, *([self._input] if self._input is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # none uses a descriptor that is closed
        if self._streams is not None:
            streams, self._streams = self._streams, None
            await streams.close()

    async def signal(self, number: int) -> None:
        """Send it a signal.  Raises ShimError."""
        if self.status != RUNNING:
            raise finished()
        try:
            await self._rpc.SignalProcess(agent_pb2.SignalProcessRequest(**self._ids, signal=number))
        except ConnectionClosed:
            pass  # it exits with its VM
        except RpcError as error:
            if self.exited.is_set() or error.code == StatusCode.NOT_FOUND:
                raise finished() from error
            raise

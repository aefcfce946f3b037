"""Channels to an agent other than gRPC's own: its dispatch in this process, without a socket, and ttrpc.

They have what the client library uses of a grpc.aio.Channel.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from caisson.agent import options as agent_options
from caisson.agent.api.health import Health
from caisson.agent.api.kata1 import status as kata1
from caisson.agent.api.kata3 import status as kata3
from caisson.agent.base.boot_timestamps import BootTimestamps
from caisson.agent.base.log import Log
from caisson.agent.base.tracing import Tracing
from caisson.agent.client import Agent
from caisson.agent.model.reaper import Reaper
from caisson.agent.rpc.dispatch import Dispatch, Method, Service
from caisson.agent.rpc.ttrpc.client import Client, RpcError
from caisson.agent.services import Services
from caisson.proto.kata1 import health_pb2
from tests.native.agent_support import RunningAgent
from tests.support.unique import unique

if TYPE_CHECKING:
    from caisson.agent.rpc.dispatch import StatusOf

CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class Channel:
    """Calls methods by their paths, by a coroutine that returns a status code and the response or an error's text."""

    def __init__(
        self,
        call: Callable[[str, bytes, float | None], Awaitable[tuple[int, bytes | str]]],
        hang_up: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._call = call
        self._hang_up = hang_up
        self._tasks: set[asyncio.Task[Any]] = set()

    def unary_unary(
        self,
        path: str,
        request_serializer: Callable[[Any], bytes] = bytes,
        response_deserializer: Callable[[bytes], Any] = bytes,
    ) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, timeout: float | None = None) -> Any:
            task = asyncio.ensure_future(self._call(path, request_serializer(request), timeout))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            code, result = await task
            if isinstance(result, str):
                raise grpc.aio.AioRpcError(CODES[code], grpc.aio.Metadata(), grpc.aio.Metadata(), result)
            return response_deserializer(result)

        return call

    async def close(self) -> None:
        """Hang up: calls under way are cancelled."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._hang_up is not None:
            await self._hang_up()


def memory_channel(dispatch: Dispatch) -> Channel:
    """Join a client and a dispatch without a socket."""

    async def call(path: str, payload: bytes, timeout: float | None) -> tuple[int, bytes | str]:
        code, result = await dispatch.call(path, payload, timeout)
        return code, result if isinstance(result, str) else b"".join(result)

    return Channel(call)


def ttrpc_channel(client: Client) -> Channel:
    """Call the same methods over ttrpc."""

    async def call(path: str, payload: bytes, timeout: float | None) -> tuple[int, bytes | str]:
        _, service, method = path.split("/")
        try:
            return 0, await client.call(service, method, payload, timeout)
        except RpcError as error:
            return error.code, error.text

    return Channel(call, client.close)


class TtrpcAgent(RunningAgent):
    """An agent that is called over ttrpc."""

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Agent]:  # type: ignore[override]
        async with Agent(ttrpc_channel(await Client.connect(self.socket))) as agent:
            yield agent


class MemoryAgent(RunningAgent):
    """An agent in this process, there while somebody is connected.

    It reaps every child and adopts orphans: a test of it runs in a process of its own (``run_in_child``).
    """

    def __init__(self, directory: Path, nsexec: Path, rootfs: Path) -> None:
        self.socket = directory / "none"
        self.state = directory / "state"
        self.log = directory / "log"
        self.rootfs = rootfs
        self.cgroup_parent = unique("caisson-test")
        self._options = agent_options.from_arguments(
            ["--nsexec", str(nsexec), "--state", str(self.state), "--cgroup-parent", self.cgroup_parent]
        )
        self.log.touch()
        self._connections = 0

    @property
    def pid(self) -> int:
        return os.getpid()

    def stop(self) -> None:
        """Nothing: it ended with its last connection."""

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Agent]:  # type: ignore[override]
        if not self._connections:
            self._start()
        self._connections += 1
        try:
            async with Agent(memory_channel(self._dispatch)) as agent:
                yield agent
        finally:
            self._connections -= 1
            if not self._connections:
                await self._services.end()
                self._reaper.stop(asyncio.get_running_loop())

    def _start(self) -> None:
        log = Log("debug", fd=os.open(self.log, os.O_WRONLY | os.O_APPEND))
        tracing, timestamps, self._reaper = Tracing(""), BootTimestamps(), Reaper()
        self._reaper.start(asyncio.get_running_loop())
        self._services = Services(self._options, self._reaper, log, tracing, timestamps, lambda: None)
        health = Service(health_pb2.DESCRIPTOR.services_by_name["Health"], Health).bind(Health(timestamps))
        methods, status_of = self._generation()
        self._dispatch = Dispatch({**health, **methods}, log, tracing, status_of)

    def _generation(self) -> tuple[dict[str, Method], StatusOf]:
        return self._services.grpc, kata1.status_of


class MemoryAgent3(MemoryAgent):
    """The same, in the later generation of the API."""

    def _generation(self) -> tuple[dict[str, Method], StatusOf]:
        return self._services.ttrpc, kata3.status_of


def run_in_child(function: Callable[..., object], arguments: dict[str, Any]) -> str:
    """Call a function or run a coroutine in a process forked off this one; returns the traceback of what it raised."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            gc.freeze()  # gRPC's objects of other tests have threads to wait for, which are not here
            if inspect.iscoroutine(returned := function(**arguments)):
                asyncio.run(returned)
        except BaseException:
            os.write(writing, traceback.format_exc()[-32768:].encode())
        finally:
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading) as pipe:
            return pipe.read()
    finally:
        os.kill(pid, signal.SIGKILL)  # it has ended, unless this was interrupted
        os.waitpid(pid, 0)

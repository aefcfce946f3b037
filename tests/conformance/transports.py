"""Run agents that are called by other means than gRPC: over ttrpc, and in this process, without a socket."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caisson.agent import options as agent_options
from caisson.agent.api.health import Health
from caisson.agent.api.kata1 import status as kata1
from caisson.agent.api.kata3 import status as kata3
from caisson.agent.api.reasons import detail_of
from caisson.agent.base.boot_timestamps import BootTimestamps
from caisson.agent.base.log import Log
from caisson.agent.base.signals import Signals
from caisson.agent.base.tracing import Tracing
from caisson.agent.client import Agent, errors, grpc_channel
from caisson.agent.model.reaper import Reaper
from caisson.agent.rpc.dispatch import Dispatch, Method, Service
from caisson.agent.rpc.ttrpc.frames import TYPE_URL
from caisson.agent.rpc.ttrpc.responses import RpcError
from caisson.agent.services import Services
from caisson.proto.kata1 import health_pb2
from tests.native.agent_support import RunningAgent
from tests.support.unique import unique

if TYPE_CHECKING:
    from caisson.agent.rpc.dispatch import StatusOf


class MemoryChannel:
    """Joins a client and a dispatcher without a socket; has what the client library uses of a channel."""

    cancels = True
    in_order = True

    def __init__(self, dispatch: Dispatch, generation: int) -> None:
        self.generation = generation
        self._dispatch = dispatch
        self._tasks: set[asyncio.Task[Any]] = set()

    async def call(self, service: str, method: str, payload: bytes, timeout: float | None) -> bytes:
        task = asyncio.ensure_future(self._dispatch.call(f"/{service}/{method}", payload, timeout))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        code, result = await task
        if isinstance(result, list):
            return b"".join(result)
        if self.generation == 1:
            raise grpc_channel.agent_error(code, result.text)
        name, value = result.detail or ("", b"")
        raise errors.agent_error(RpcError(code, result.text, [(TYPE_URL + name, value)]))

    async def close(self) -> None:
        """Hang up: calls in progress are cancelled."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


class TtrpcAgent(RunningAgent):
    """An agent that is called over ttrpc."""

    def connect(self) -> Agent:
        return Agent.connect(self.socket, "ttrpc")


class MemoryAgent(RunningAgent):
    """An agent in this process, which exists while somebody is connected.

    It reaps every child and adopts orphans, so its tests run in a separate process (``run_in_child``).
    """

    generation = 1

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
        """Do nothing: the agent ended with its last connection."""

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Agent]:  # type: ignore[override]
        if not self._connections:
            self._start()
        self._connections += 1
        try:
            async with Agent(MemoryChannel(self._dispatch, self.generation)) as agent:
                yield agent
        finally:
            self._connections -= 1
            if not self._connections:
                await self._services.end()
                self._signals.close()

    def _start(self) -> None:
        log = Log("debug", fd=os.open(self.log, os.O_WRONLY | os.O_APPEND))
        tracing, timestamps, self._reaper = Tracing(""), BootTimestamps(), Reaper()
        self._signals = Signals(asyncio.get_running_loop())
        self._reaper.start(self._signals)
        self._services = Services(self._options, self._reaper, log, tracing, timestamps, lambda: None)
        health = Service(health_pb2.DESCRIPTOR.services_by_name["Health"], Health).bind(Health(timestamps))
        methods, status_of = self._api()
        self._dispatch = Dispatch({**health, **methods}, log, tracing, status_of, detail_of=detail_of)

    def _api(self) -> tuple[dict[str, Method], StatusOf]:
        return self._services.grpc, kata1.status_of


class MemoryAgent3(MemoryAgent):
    """The same, with the later generation of the API."""

    generation = 3

    def _api(self) -> tuple[dict[str, Method], StatusOf]:
        return self._services.ttrpc, kata3.status_of


def run_in_child(function: Callable[..., object], arguments: dict[str, Any]) -> str:
    """Call a function or run a coroutine in a forked process; return the traceback of its exception, if any."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            gc.freeze()  # gRPC objects of other tests wait for threads that do not exist here
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
        os.kill(pid, signal.SIGKILL)  # it has exited, unless this was interrupted
        os.waitpid(pid, 0)

"""Connect to an agent and drive it through handles: Agent → Container → Process."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast

from google.protobuf import message_factory
from google.protobuf.message import DecodeError

from caisson.agent.base import heap
from caisson.agent.client.caller import OUTPUT_CHUNK
from caisson.agent.client.channel import AgentChannel, BlockingChannel, TtrpcChannel
from caisson.agent.client.errors import AgentError, Reason
from caisson.agent.rpc.codes import StatusCode
from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata3 import agent_pb2

if TYPE_CHECKING:
    from caisson.agent.client.guest import Machine
    from caisson.proto.kata1 import oci_pb2

T = TypeVar("T")


def _json(document: Mapping[str, Any]) -> bytes:
    """Encode a document; bytes that are not UTF-8 become escaped lone surrogates."""
    return json.dumps(document).encode()


class _Service:
    """The methods of one service as coroutines: ``await service.ReadStdout(request)``."""

    def __init__(self, channel: AgentChannel, descriptor: Any) -> None:
        self._channel = channel
        self._name = descriptor.full_name
        self._methods = descriptor.methods_by_name

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        if name not in self._methods:
            raise AttributeError(name)
        response_class = message_factory.GetMessageClass(self._methods[name].output_type)

        async def call(request: Any, timeout: float | None = None) -> Any:
            payload = await self._channel.call(self._name, name, request.SerializeToString(), timeout)
            try:
                return response_class.FromString(payload)
            except DecodeError:
                text = f"{name}: the answer is not a valid {response_class.DESCRIPTOR.name}"
                raise AgentError(StatusCode.INTERNAL, text) from None

        setattr(self, name, call)
        return call


class Agent:
    """One connection to the agent in a guest.  ``rpc`` and ``health`` have every method of the API by name.

    ``rpc`` is grpc.AgentService of Kata 1.x over gRPC and of Kata 3.x over ttrpc; ``guest`` is caisson.Guest over both.
    """

    def __init__(self, channel: AgentChannel) -> None:
        heap.raise_mmap_threshold()
        self.channel = channel

    @classmethod
    def connect(cls, socket: str | os.PathLike[str], protocol: Literal["grpc", "ttrpc"] = "grpc") -> Self:
        """Return a lazy connection to a VM's ``agent.sock``; nothing is sent yet.

        Our agent speaks both protocols; ttrpc is faster and needs no grpc import, but only over gRPC does cancelling a
        call cancel it in the guest.
        """
        if protocol == "ttrpc":
            return cls(TtrpcChannel(socket))
        from caisson.agent.client.grpc_channel import GrpcChannel

        return cls(GrpcChannel(socket))

    @cached_property
    def rpc(self) -> _Service:
        """grpc.AgentService, of the generation that the channel carries."""
        if self.channel.generation == 3:
            return _Service(self.channel, agent_pb2.DESCRIPTOR.services_by_name["AgentService"])
        from caisson.proto.kata1 import agent_pb2 as kata1

        return _Service(self.channel, kata1.DESCRIPTOR.services_by_name["AgentService"])

    @cached_property
    def health(self) -> _Service:
        """grpc.Health, which is the same in all generations."""
        from caisson.proto.kata3 import health_pb2

        return _Service(self.channel, health_pb2.DESCRIPTOR.services_by_name["Health"])

    @cached_property
    def guest(self) -> _Service:
        """caisson.Guest, served by our agents."""
        return _Service(self.channel, caisson_pb2.DESCRIPTOR.services_by_name["Guest"])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def version(self) -> str:
        """Return the agent's version."""
        from caisson.proto.kata3 import health_pb2

        answer = await self.health.Version(health_pb2.CheckRequest())
        return str(answer.agent_version)

    async def create_sandbox(self, sandbox_id: str = "sandbox", *, hostname: str = "", dns: Sequence[str] = ()) -> bool:
        """Start the sandbox; False if there already is one.  ``dns`` are the lines of the guest's resolv.conf."""
        if self.channel.generation == 3:  # whose CreateSandbox replaces an empty sandbox
            wanted = caisson_pb2.EnsureSandboxRequest(sandbox_id=sandbox_id, hostname=hostname, dns=dns)
            return bool((await self.guest.EnsureSandbox(wanted)).created)
        request = agent_pb2.CreateSandboxRequest(sandbox_id=sandbox_id, hostname=hostname, dns=dns)
        try:
            await self.rpc.CreateSandbox(request)
        except AgentError as error:
            if error.code is StatusCode.ALREADY_EXISTS:
                return False
            raise
        return True

    async def destroy_sandbox(self, timeout: float | None = None) -> None:
        """Destroy the sandbox with all its containers."""
        if self.channel.generation == 3:  # whose DestroySandbox ends the guest
            await self.guest.DestroySandbox(caisson_pb2.DestroySandboxRequest(), timeout)
        else:
            await self.rpc.DestroySandbox(agent_pb2.DestroySandboxRequest(), timeout)

    async def load_module(self, name: str) -> None:
        """Load a kernel module from the guest's image; a no-op if it is loaded or built in."""
        await self.guest.LoadModule(caisson_pb2.LoadModuleRequest(name=name))

    def container(self, container_id: str) -> Container:
        """Return a handle on an existing container."""
        return Container(self, container_id)

    async def create_container(
        self, container_id: str, spec: oci_pb2.Spec | Mapping[str, Any], storages: Iterable[caisson_pb2.Storage] = ()
    ) -> Container:
        """Create a container from a config.json document, or a grpc.Spec; it runs after ``start``.

        Raises AgentError if the id is in use.
        """
        if isinstance(spec, Mapping):
            await self.create_container_reporting(container_id, spec, storages)
        else:
            await self.rpc.CreateContainer(self._create_request(container_id, spec))
        return Container(self, container_id)

    def _create_request(self, container_id: str, spec: oci_pb2.Spec) -> Any:
        if self.channel.generation == 3:
            from caisson.agent.client.wire_specs import to_kata3

            oci = to_kata3(spec)
            return agent_pb2.CreateContainerRequest(container_id=container_id, exec_id=container_id, OCI=oci)
        from caisson.proto.kata1 import agent_pb2 as kata1

        return kata1.CreateContainerRequest(container_id=container_id, exec_id=container_id, OCI=spec)

    async def create_container_reporting(
        self, container_id: str, document: Mapping[str, Any], storages: Iterable[caisson_pb2.Storage] = ()
    ) -> list[str]:
        """Create a container from a config.json document; returns warnings about fields that have no meaning in a
        guest.
        """
        config = _json(document)
        request = caisson_pb2.CreateContainerRequest(container_id=container_id, config=config, storages=storages)
        return list((await self.guest.CreateContainer(request)).warnings)

    async def ensure_container(self, container_id: str, spec: oci_pb2.Spec | Mapping[str, Any]) -> Container:
        """Return a running container of this id, creating it from the spec if needed, in one call.

        A stopped one is replaced, and a missing sandbox is started.  Concurrent callers all get the same
        container.
        """
        encoded = _json(spec) if isinstance(spec, Mapping) else spec.SerializeToString()
        request = caisson_pb2.EnsureRunningRequest(container_id=container_id, spec=encoded)
        await self.guest.EnsureRunning(request)
        return Container(self, container_id)


class Container:
    """A container in a guest."""

    def __init__(self, agent: Agent, container_id: str) -> None:
        self.agent = agent
        self.id = container_id

    async def recreate(self) -> None:
        """Create it again after it has exited, on the files that it left; it runs after ``start``."""
        await self.agent.guest.RecreateContainer(caisson_pb2.RecreateContainerRequest(container_id=self.id))

    async def start(self) -> None:
        """Start the program of a created container."""
        await self.agent.rpc.StartContainer(agent_pb2.StartContainerRequest(container_id=self.id))

    def init(self, *, terminal: bool = False) -> Process:
        """Return its init process; ``terminal`` as in its spec."""
        return Process(self, self.id, terminal=terminal)

    def process(self, exec_id: str, *, terminal: bool = False) -> Process:
        """Return a handle on one of its processes."""
        return Process(self, exec_id, terminal=terminal)

    async def exec(
        self,
        args: Sequence[str],
        *,
        env: Sequence[str] = (),
        cwd: str = "/",
        uid: int = 0,
        gid: int = 0,
        terminal: bool = False,
        size: tuple[int, int] | None = None,
        exec_id: str | None = None,
    ) -> Process:
        """Execute another process and return once it runs.

        ``env`` holds ``NAME=value`` strings, ``size`` is a terminal's, in rows and columns.  Strings that are not UTF-8
        are as from os.fsdecode().  Raises ProgramError when the program cannot be run.
        """
        exec_id = exec_id or os.urandom(16).hex()
        user = {"uid": uid, "gid": gid}
        document = {"args": list(args), "env": list(env), "cwd": cwd, "user": user, "terminal": terminal}
        if size is not None:
            document["consoleSize"] = {"height": size[0], "width": size[1]}
        request = caisson_pb2.ExecProcessRequest(container_id=self.id, exec_id=exec_id, process=_json(document))
        await self.agent.guest.ExecProcess(request)
        return Process(self, exec_id, terminal=terminal)

    async def signal(self, number: int) -> None:
        """Signal every process in it."""
        if self.agent.channel.generation == 3:  # whose SignalProcess signals only init
            request = caisson_pb2.SignalContainerRequest(container_id=self.id, signal=number)
            await self.agent.guest.SignalContainer(request)
        else:
            await self.agent.rpc.SignalProcess(agent_pb2.SignalProcessRequest(container_id=self.id, signal=number))

    async def pause(self) -> None:
        """Freeze all processes."""
        await self.agent.rpc.PauseContainer(agent_pb2.PauseContainerRequest(container_id=self.id))

    async def resume(self) -> None:
        """Thaw all processes."""
        await self.agent.rpc.ResumeContainer(agent_pb2.ResumeContainerRequest(container_id=self.id))

    async def remove(self, timeout: int = 0) -> None:
        """Kill and remove it; ``timeout`` in seconds, 0 waits forever."""
        await self.agent.rpc.RemoveContainer(agent_pb2.RemoveContainerRequest(container_id=self.id, timeout=timeout))


class Process:
    """A process in a container."""

    def __init__(self, container: Container, exec_id: str, *, terminal: bool) -> None:
        self.container = container
        self.exec_id = exec_id
        self.terminal = terminal
        self._rpc = container.agent.rpc
        self._cancels = container.agent.channel.cancels
        self._ahead = int(container.agent.channel.in_order)  # pieces of input sent before an earlier one is taken
        self._reads: dict[str, asyncio.Future[Any]] = {}  # reads that nobody waits for, by method
        self._key = {"container_id": container.id, "exec_id": exec_id}

    async def write(self, data: bytes) -> None:
        """Write to standard input; returns once the process's pipe has accepted all of it."""
        if data:  # in 3.x empty data means end of input
            await self._rpc.WriteStdin(agent_pb2.WriteStreamRequest(data=data, **self._key))

    async def feed(self, pieces: AsyncIterable[bytes]) -> None:
        """Write pieces to standard input, and close it at their end.

        Where calls keep their order a piece is on its way while the process takes the one before: the guest does not
        wait for this machine.
        """
        writing: list[asyncio.Task[None]] = []
        try:
            async for piece in pieces:
                writing.append(asyncio.create_task(self.write(piece)))
                if len(writing) > self._ahead:
                    await writing.pop(0)
            for last in writing:
                await last
            await self.close_stdin()
        finally:
            for task in writing:
                task.cancel()
            await asyncio.gather(*writing, return_exceptions=True)

    async def close_stdin(self) -> None:
        """Close standard input; a no-op on a terminal."""
        if not self.terminal:
            await self._rpc.CloseStdin(agent_pb2.CloseStdinRequest(**self._key))

    def stdout(self) -> AsyncIterator[bytes]:
        """Yield standard output (with a terminal: all output) until its end."""
        return self._stream("ReadStdout")

    def stderr(self) -> AsyncIterator[bytes]:
        """Yield standard error until its end."""
        return self._stream("ReadStderr")

    async def _stream(self, method: str) -> AsyncIterator[bytes]:
        while True:
            try:
                answer = await self._read(method)
            except AgentError as error:
                if error.reason is Reason.END_OF_OUTPUT:  # 1.x's end marker
                    return
                raise
            if not answer.data:  # 3.x's
                return
            yield answer.data

    async def _read(self, method: str) -> Any:
        request = agent_pb2.ReadStreamRequest(len=OUTPUT_CHUNK, **self._key)
        reading = getattr(self._rpc, method)
        if self._cancels:
            return await reading(request)
        # The agent continues a read that is cancelled here: its result is for the next one.
        read = self._reads.pop(method, None) or asyncio.ensure_future(reading(request))
        try:
            return await asyncio.shield(read)
        except asyncio.CancelledError:
            if not read.cancelled():
                self._reads[method] = read
                read.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may ask for it
            raise

    async def resize(self, rows: int, columns: int) -> None:
        """Set its terminal's size, in characters."""
        await self._rpc.TtyWinResize(agent_pb2.TtyWinResizeRequest(row=rows, column=columns, **self._key))

    async def signal(self, number: int) -> None:
        """Send it a signal."""
        await self._rpc.SignalProcess(agent_pb2.SignalProcessRequest(signal=number, **self._key))

    async def wait(self) -> int:
        """Wait for its exit status: 0-255, or 128 + the signal that killed it."""
        answer = await self._rpc.WaitProcess(agent_pb2.WaitProcessRequest(**self._key))
        return int(answer.status)


def call_sync(machine: Machine, work: Callable[[Agent], Awaitable[T]]) -> T:
    """Run a coroutine that awaits nothing but calls of a VM's agent, without an event loop.  Raises AgentError."""

    async def asked() -> T:
        async with Agent(BlockingChannel(machine.agent_socket)) as agent:
            return await work(agent)

    running = asked()
    try:
        running.send(None)
    except StopIteration as done:
        return cast(T, done.value)
    finally:
        running.close()
    raise RuntimeError(f"{work}: awaits something else than a call")


def run_sync(machine: Machine, work: Callable[[Agent], Awaitable[T]]) -> T:
    """Run a coroutine with a VM's agent, in an event loop.  Raises AgentError."""

    async def asked() -> T:
        async with Agent.connect(machine.agent_socket, "ttrpc") as agent:
            return await work(agent)

    return asyncio.run(asked())

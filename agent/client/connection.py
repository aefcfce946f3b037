"""Connect to an agent and drive it through handles: Agent → Container → Process."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import grpc
from google.protobuf import message_factory

from caisson.agent.base import heap
from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata1 import agent_pb2, health_pb2, oci_pb2

#: Bytes asked for or sent in one call.  A pipe holds 64 KiB by default, a gRPC message 4 MiB.
CHUNK = 1 << 20

#: A guest's agent is one hop away: a lost connection is tried again at once, not after gRPC's second.
CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    # By its name a pause; to gRPC it is also how long an attempt may take, and a busy guest without KVM takes its time.
    ("grpc.min_reconnect_backoff_ms", 20_000),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_http_proxy", 0),
    # The peer of a Unix socket has no name; without this the path itself becomes the :authority.
    ("grpc.default_authority", "agent"),
    # An answer with a MiB of output comes in one piece: the agent need not wait for room, nor cut it into 16 KiB.
    ("grpc.http2.lookahead_bytes", 4 * CHUNK),
    ("grpc.http2.max_frame_size", 2 * CHUNK),
]


class AgentError(Exception):
    """The agent refused a call; the text is the agent's."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details or code.name)
        self.code = code
        self.details = details


class AgentGone(AgentError):
    """Nobody answers on the agent's socket any more: the guest or its VM has ended."""


class ProgramError(AgentError):
    """The program could not be run; exit_status is what a shell would report (127 not found, 126 not executable)."""

    def __init__(self, code: grpc.StatusCode, details: str, exit_status: int) -> None:
        super().__init__(code, details)
        self.exit_status = exit_status


def _error(failure: grpc.RpcError) -> AgentError:
    code, details = failure.code(), failure.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        return AgentGone(code, f"the agent does not answer ({details})")
    # These two texts are the ones container runtimes agree on (facts: docker and containerd look for them, too).
    for text, status in (("executable file not found in $PATH", 127), ("no such file or directory", 127)):
        if "exec: " in details and text in details:
            return ProgramError(code, details, status)
    if "exec: " in details and "permission denied" in details:
        return ProgramError(code, details, 126)
    return AgentError(code, details)


def _json(document: Mapping[str, Any]) -> bytes:
    """Encode a document; words that are no UTF-8 become escapes of lone surrogates."""
    return json.dumps(document).encode()


class _Service:
    """Call the methods of one service as coroutines: ``await service.ReadStdout(request)``."""

    def __init__(self, channel: grpc.aio.Channel, descriptor: Any) -> None:
        self._calls: dict[str, Callable[..., Awaitable[Any]]] = {
            method.name: channel.unary_unary(
                f"/{descriptor.full_name}/{method.name}",
                request_serializer=message_factory.GetMessageClass(method.input_type).SerializeToString,
                response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
            )
            for method in descriptor.methods
        }

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        try:
            method = self._calls[name]
        except KeyError:
            raise AttributeError(name) from None

        async def call(request: Any, timeout: float | None = None) -> Any:
            try:
                return await method(request, timeout=timeout)
            except grpc.aio.AioRpcError as failure:
                raise _error(failure) from failure

        return call


class Agent:
    """One connection to the agent in a guest.  ``rpc`` and ``health`` give every method of the API by its name."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        heap.raise_mmap_threshold()
        self._channel = channel
        self.rpc = _Service(channel, agent_pb2.DESCRIPTOR.services_by_name["AgentService"])
        self.health = _Service(channel, health_pb2.DESCRIPTOR.services_by_name["Health"])
        self.guest = _Service(channel, caisson_pb2.DESCRIPTOR.services_by_name["Guest"])

    @classmethod
    def connect(cls, socket: str | os.PathLike[str]) -> Self:
        """Return a lazy connection to a VM's ``agent.sock``; nothing is sent yet."""
        return cls(grpc.aio.insecure_channel(f"unix:{Path(socket).resolve()}", options=CHANNEL_OPTIONS))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def version(self) -> str:
        """Return the agent's version."""
        answer = await self.health.Version(health_pb2.CheckRequest())
        return str(answer.agent_version)

    async def create_sandbox(self, sandbox_id: str = "sandbox", *, hostname: str = "", dns: Sequence[str] = ()) -> bool:
        """Start the sandbox; False when there is one already.  ``dns`` are the lines of the guest's resolv.conf."""
        request = agent_pb2.CreateSandboxRequest(sandbox_id=sandbox_id, hostname=hostname, dns=dns)
        return await self._created(self.rpc.CreateSandbox(request))

    async def destroy_sandbox(self, timeout: float | None = None) -> None:
        """End every container."""
        await self.rpc.DestroySandbox(agent_pb2.DestroySandboxRequest(), timeout)

    async def load_module(self, name: str) -> None:
        """Load a module of the guest's kernel from its image; a no-op when it is loaded or built in."""
        await self.guest.LoadModule(caisson_pb2.LoadModuleRequest(name=name))

    def container(self, container_id: str) -> Container:
        """Return a handle on a container that exists."""
        return Container(self, container_id)

    async def create_container(
        self, container_id: str, spec: oci_pb2.Spec | Mapping[str, Any], storages: Iterable[caisson_pb2.Storage] = ()
    ) -> Container:
        """Create a container from a config.json document, or a grpc.Spec; it runs after ``start``.

        Raises AgentError when the id is taken.
        """
        if isinstance(spec, oci_pb2.Spec):
            request = agent_pb2.CreateContainerRequest(container_id=container_id, exec_id=container_id, OCI=spec)
            await self.rpc.CreateContainer(request)
        else:
            await self.create_container_reporting(container_id, spec, storages)
        return Container(self, container_id)

    async def create_container_reporting(
        self, container_id: str, document: Mapping[str, Any], storages: Iterable[caisson_pb2.Storage] = ()
    ) -> list[str]:
        """Create a container from a config.json document; returns warnings about fields that mean nothing there."""
        config = _json(document)
        request = caisson_pb2.CreateContainerRequest(container_id=container_id, config=config, storages=storages)
        return list((await self.guest.CreateContainer(request)).warnings)

    async def ensure_container(self, container_id: str, spec: oci_pb2.Spec | Mapping[str, Any]) -> Container:
        """Return a running container of this id, created from the spec where there is none, in one call.

        A stopped one is replaced, and where there is no sandbox one is started.  Concurrent callers all get the same
        container.
        """
        encoded = spec.SerializeToString() if isinstance(spec, oci_pb2.Spec) else _json(spec)
        request = caisson_pb2.EnsureRunningRequest(container_id=container_id, spec=encoded)
        await self.guest.EnsureRunning(request)
        return Container(self, container_id)

    @staticmethod
    async def _created(call: Awaitable[Any]) -> bool:
        try:
            await call
        except AgentError as error:
            if error.code is grpc.StatusCode.ALREADY_EXISTS:
                return False
            raise
        return True


class Container:
    """A container in a guest."""

    def __init__(self, agent: Agent, container_id: str) -> None:
        self.agent = agent
        self.id = container_id

    async def start(self) -> None:
        """Start the program of a created container."""
        await self.agent.rpc.StartContainer(agent_pb2.StartContainerRequest(container_id=self.id))

    def init(self, *, terminal: bool = False) -> Process:
        """Return its first process; ``terminal`` as in its spec."""
        return Process(self, self.id, terminal=terminal)

    def process(self, exec_id: str, *, terminal: bool = False) -> Process:
        """Return a handle on a process of it."""
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

        ``env`` holds ``NAME=value`` strings, ``size`` is a terminal's, in rows and columns.  Words that are no UTF-8
        are those of os.fsdecode().  Raises ProgramError when the program cannot be run.
        """
        exec_id = exec_id or uuid.uuid4().hex
        user = {"uid": uid, "gid": gid}
        document = {"args": list(args), "env": list(env), "cwd": cwd, "user": user, "terminal": terminal}
        if size is not None:
            document["consoleSize"] = {"height": size[0], "width": size[1]}
        request = caisson_pb2.ExecProcessRequest(container_id=self.id, exec_id=exec_id, process=_json(document))
        await self.agent.guest.ExecProcess(request)
        return Process(self, exec_id, terminal=terminal)

    async def signal(self, number: int) -> None:
        """Signal every process in it."""
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
        self._key = {"container_id": container.id, "exec_id": exec_id}

    async def write(self, data: bytes) -> None:
        """Write to standard input; returns when the process's pipe has taken all of it."""
        await self._rpc.WriteStdin(agent_pb2.WriteStreamRequest(data=data, **self._key))

    async def close_stdin(self) -> None:
        """Close standard input; a no-op on a terminal."""
        await self._rpc.CloseStdin(agent_pb2.CloseStdinRequest(**self._key))

    def stdout(self) -> AsyncIterator[bytes]:
        """Yield standard output (with a terminal: all output) until its end."""
        return self._stream(self._rpc.ReadStdout)

    def stderr(self) -> AsyncIterator[bytes]:
        """Yield standard error until its end."""
        return self._stream(self._rpc.ReadStderr)

    async def _stream(self, read: Callable[..., Awaitable[Any]]) -> AsyncIterator[bytes]:
        request = agent_pb2.ReadStreamRequest(len=CHUNK, **self._key)
        while True:
            try:
                answer = await read(request)
            except AgentError as error:
                # The API has no end marker but this; the second text is a terminal whose last process has gone.
                if error.details == "EOF" or "input/output error" in error.details:
                    return
                raise
            if not answer.data:  # over ttrpc, which speaks the later generation
                return
            yield answer.data

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal, in characters."""
        await self._rpc.TtyWinResize(agent_pb2.TtyWinResizeRequest(row=rows, column=columns, **self._key))

    async def signal(self, number: int) -> None:
        """Send it a signal."""
        await self._rpc.SignalProcess(agent_pb2.SignalProcessRequest(signal=number, **self._key))

    async def wait(self) -> int:
        """Wait for its exit status: 0-255, or 128 + the signal that killed it."""
        answer = await self._rpc.WaitProcess(agent_pb2.WaitProcessRequest(**self._key))
        return int(answer.status)


def _health_check(channel: grpc.Channel) -> grpc.UnaryUnaryMultiCallable[Any, Any]:
    return channel.unary_unary(
        f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/Check",
        request_serializer=health_pb2.CheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )


def is_serving(socket: str | os.PathLike[str], timeout: float) -> bool:
    """Check whether an agent serves on a socket, waiting up to ``timeout`` seconds for one that starts."""
    with grpc.insecure_channel(f"unix:{Path(socket).resolve()}", options=CHANNEL_OPTIONS) as channel:
        try:
            answer = _health_check(channel)(health_pb2.CheckRequest(), timeout=timeout, wait_for_ready=True)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


#: A starting guest refuses connections until its agent listens: retry often.
STARTING_OPTIONS = {"grpc.initial_reconnect_backoff_ms": 20, "grpc.max_reconnect_backoff_ms": 50}


class ReadinessProbe:
    """Probe whether a guest's agent serves; the `ready` of VM.start.  Each call waits up to ``timeout`` seconds.

    One Health.Check is sent on a connection that is retried at short intervals.  The guest accepts as soon as the
    agent listens, long before it serves, and answers the request that waits there.
    """

    def __init__(self, timeout: float = 1.0) -> None:
        self._timeout = timeout
        self._channel: grpc.Channel | None = None
        self._answer: Any = None

    def __call__(self, socket: Path) -> bool:
        if self._channel is None:
            options = {**dict(CHANNEL_OPTIONS), **STARTING_OPTIONS}
            self._channel = grpc.insecure_channel(f"unix:{socket.resolve()}", options=list(options.items()))
            self._answer = _health_check(self._channel).future(health_pb2.CheckRequest(), wait_for_ready=True)
        try:
            answer = self._answer.result(self._timeout)
        except grpc.FutureTimeoutError:
            return False
        except grpc.RpcError:
            answer = None
        self._channel.close()
        self._channel = None
        return answer is not None and bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

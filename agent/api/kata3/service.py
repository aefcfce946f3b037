"""grpc.AgentService of Kata 3.x: methods on the sandbox, containers and processes."""

from __future__ import annotations

import signal
from contextlib import suppress

from caisson.agent.api.containers import (
    EMPTY,
    ContainerService,
    check_signal,
    devices_of,
    load_modules,
    read_response,
    spec_of,
    storage_of,
)
from caisson.agent.base.errors import EndOfStream, FailedPrecondition, InvalidArgument, ProcessExited, Unsupported
from caisson.agent.guest.storage import FsGroup
from caisson.agent.rpc import wire
from caisson.proto.kata3 import agent_pb2, types_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import ModuleType
    from typing import ClassVar

    from google.protobuf.empty_pb2 import Empty

    from caisson.agent.guest.storage import Storage
    from caisson.agent.libcontainer.config.spec import Spec
    from caisson.agent.model.sandbox import Sandbox

#: The annotation in which the kubelet names a container's termination message file.
TERMINATION_LOG = "io.kubernetes.container.terminationMessagePath"

#: Bytes of it that clients read.
MAX_TERMINATION_LOG = 4096


class AgentService(ContainerService):
    """An empty exec_id means the container's init process, and an empty response the end of output."""

    messages: ClassVar[ModuleType] = agent_pb2
    EXEC_FIELDS = ("args", "env", "cwd", "user", "terminal", "capabilities")
    DEVICE_HANDLERS = ()
    STORAGE_HANDLERS = (
        "blk", "blk-ccw", "mmioblk", "scsi", "nvdimm", "ephemeral", "local", "overlayfs", "virtio-fs", "9p",
        "watchable-bind", "erofs.multi-layer",
    )  # fmt: skip

    def __init__(self, sandbox: Sandbox, *, init: bool, end: Callable[[], object]) -> None:
        """``end`` stops the agent, once it has answered pending requests; as PID 1 it then powers the guest off."""
        super().__init__(sandbox, init=init)
        self._end = end

    # The sandbox

    async def CreateSandbox(self, request: agent_pb2.CreateSandboxRequest) -> Empty:
        await load_modules(request.kernel_modules)
        if self._sandbox.running and self._sandbox.empty:
            await self._sandbox.destroy()  # a host may start over
        await self._sandbox.start(
            request.sandbox_id,
            request.hostname,
            hook_path=request.guest_hook_path,
            shared_pids=request.sandbox_pidns,
            dns=request.dns,
            storages=[_storage(one) for one in request.storages],
        )
        return EMPTY

    async def DestroySandbox(self, request: agent_pb2.DestroySandboxRequest) -> Empty:
        await self._sandbox.destroy()
        self._end()
        return EMPTY

    async def UpdateEphemeralMounts(self, request: agent_pb2.UpdateEphemeralMountsRequest) -> Empty:
        await self._sandbox.resize([_storage(one) for one in request.storages])
        return EMPTY

    # Containers

    async def CreateContainer(self, request: agent_pb2.CreateContainerRequest) -> Empty:
        _refuse_ports(request)
        request.OCI.Process.ApparmorProfile = ""  # the host's profile: not in the guest
        spec = spec_of(request)
        if request.shared_mounts:
            raise Unsupported("CreateContainer: shared_mounts are not supported by this agent")
        await self._sandbox.create(
            request.container_id,
            request.exec_id,
            _with_cgroupfs_path(spec),
            [_storage(one) for one in request.storages],
            devices_of(request),
            share_pids=request.sandbox_pidns,
        )
        return EMPTY

    async def UpdateContainer(self, request: agent_pb2.UpdateContainerRequest) -> Empty:
        self._sandbox.container(request.container_id)
        if request.HasField("resources"):
            await self._update(request)
        return EMPTY

    async def GetDiagnosticData(
        self, request: agent_pb2.GetDiagnosticDataRequest
    ) -> agent_pb2.GetDiagnosticDataResponse:
        from caisson.agent.guest.volumes import read_head

        if request.log_type != "termination_log":
            raise InvalidArgument(f"log_type: {request.log_type!r} is not known; termination_log is")
        container = self._sandbox.container(request.container_id)
        path = container.spec.annotations.get(TERMINATION_LOG)
        if not path:
            raise FailedPrecondition(f"container {request.container_id}: has no annotation {TERMINATION_LOG}")
        source = next((mount.source for mount in container.spec.mounts if mount.destination == path), "")
        data = await container.reads(lambda: read_head(source, MAX_TERMINATION_LOG)) if source else b""
        return agent_pb2.GetDiagnosticDataResponse(data=data.decode(errors="replace"))

    # Processes and their streams

    async def ExecProcess(self, request: agent_pb2.ExecProcessRequest) -> Empty:
        _refuse_ports(request)
        await self._exec(request)
        return EMPTY

    async def SignalProcess(self, request: agent_pb2.SignalProcessRequest) -> Empty:
        container = self._sandbox.container(request.container_id)
        check_signal(request.signal)
        try:
            if not request.exec_id and request.signal == signal.SIGKILL:
                await container.signal_all(request.signal)
            else:
                await container.signal(request.exec_id, request.signal)
        except ProcessExited:
            pass  # it has just exited: no host should fail because of that
        return EMPTY

    async def ReadStdout(self, request: agent_pb2.ReadStreamRequest) -> list[bytes]:
        return await _until_the_end(self._process(request).read_stdout(request.len))

    async def ReadStderr(self, request: agent_pb2.ReadStreamRequest) -> list[bytes]:
        return await _until_the_end(self._process(request).read_stderr(request.len))

    async def WriteStdin(self, request: WriteStreamRequest) -> agent_pb2.WriteStreamResponse:
        process = self._process(request)
        if not request.data:
            await process.close_stdin()
        return agent_pb2.WriteStreamResponse(len=await process.write(request.data) if request.data else 0)


class WriteStreamRequest:
    """A grpc.WriteStreamRequest whose data, when long, stay where they were received: protobuf copies them twice."""

    DESCRIPTOR = agent_pb2.WriteStreamRequest.DESCRIPTOR

    def __init__(self) -> None:
        self.container_id = self.exec_id = ""
        self.data: bytes | memoryview = b""

    def ParseFromString(self, payload: bytes | memoryview) -> None:
        """Decode it.  Raises DecodeError."""
        if isinstance(payload, memoryview) and (fields := wire.views(payload, 3)):
            with suppress(UnicodeDecodeError):
                self.container_id, self.exec_id = str(fields[0], "utf-8"), str(fields[1], "utf-8")
                self.data = fields[2]
                return
        request = agent_pb2.WriteStreamRequest.FromString(bytes(payload))
        self.container_id, self.exec_id, self.data = request.container_id, request.exec_id, request.data


async def _until_the_end(reading: Awaitable[bytes]) -> list[bytes]:
    try:
        return read_response(await reading)
    except EndOfStream:
        return []


def _storage(one: agent_pb2.Storage) -> Storage:
    group = None
    if one.HasField("fs_group"):
        policy = one.fs_group.group_change_policy
        group = FsGroup(one.fs_group.group_id, policy == types_pb2.OnRootMismatch)
    return storage_of(one).but(group=group, shared=one.shared)


def _refuse_ports(request: agent_pb2.CreateContainerRequest | agent_pb2.ExecProcessRequest) -> None:
    """Reject stream ports outside this API, which hosts use if a kernel parameter says that they can."""
    if request.stdin_port or request.stdout_port or request.stderr_port:
        raise Unsupported("stdin_port, stdout_port and stderr_port are not supported: streams go by this API")


def _with_cgroupfs_path(spec: Spec) -> Spec:
    """Convert a path in systemd's form, SLICE:PREFIX:NAME, to one in the cgroup file system: SLICE/PREFIX-NAME."""
    parts = spec.linux.cgroups_path.split(":")
    if len(parts) != 3:
        return spec
    slice_, prefix, name = parts
    path = "/".join(part for part in (slice_, f"{prefix}-{name}" if prefix else name) if part)
    return spec.but(linux=spec.linux.but(cgroups_path=path))

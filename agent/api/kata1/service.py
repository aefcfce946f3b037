"""grpc.AgentService of Kata 1.x: methods on the sandbox, containers and processes."""

from __future__ import annotations

import json

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
from caisson.agent.api.status import StatusError
from caisson.agent.base.errors import ContainerNotFound, ProcessExited, ProcessNotFound, Unsupported
from caisson.agent.guest import devices, ps
from caisson.agent.libcontainer.state import PAUSED, STOPPED
from caisson.agent.rpc.codes import StatusCode
from caisson.proto.kata1 import agent_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import ClassVar

    from google.protobuf.empty_pb2 import Empty

    from caisson.agent.api.containers import OfContainer
    from caisson.agent.model.container import Container


class AgentService(ContainerService):
    """Most methods are rejected before there is a sandbox."""

    messages: ClassVar[ModuleType] = agent_pb2
    EXEC_FIELDS = ("args", "env", "cwd", "user", "terminal")
    DEVICE_HANDLERS = devices.TYPES
    STORAGE_HANDLERS = ("9p", "virtio-fs", "blk", "blk-ccw", "mmioblk", "scsi", "ephemeral", "local", "nvdimm")

    async def CreateSandbox(self, request: agent_pb2.CreateSandboxRequest) -> Empty:
        await load_modules(request.kernel_modules)
        await self._sandbox.start(
            request.sandbox_id,
            request.hostname,
            hook_path=request.guest_hook_path,
            shared_pids=request.sandbox_pidns,
            dns=request.dns,
            storages=[storage_of(one) for one in request.storages],
        )
        return EMPTY

    async def DestroySandbox(self, request: agent_pb2.DestroySandboxRequest) -> Empty:
        await self._sandbox.destroy()
        return EMPTY

    async def CreateContainer(self, request: agent_pb2.CreateContainerRequest) -> Empty:
        self._need_sandbox("Sandbox not started, impossible to run a new container")
        spec = spec_of(request)
        if request.agent_pidns:
            raise Unsupported("CreateContainer: agent_pidns is not supported: containers do not see the agent")
        if request.sandbox_pidns and not self._sandbox.shares_pids:
            raise Unsupported("CreateContainer: sandbox_pidns needs a sandbox that was created with it")
        storages = [storage_of(one) for one in request.storages]
        await self._sandbox.create(request.container_id, request.exec_id, spec, storages, devices_of(request))
        return EMPTY

    async def UpdateContainer(self, request: agent_pb2.UpdateContainerRequest) -> Empty:
        self._sandbox.container(request.container_id)
        if not request.HasField("resources"):
            raise StatusError(StatusCode.UNKNOWN, "Resources in the request are nil")
        await self._update(request)
        return EMPTY

    async def ListProcesses(self, request: agent_pb2.ListProcessesRequest) -> agent_pb2.ListProcessesResponse:
        container = self._sandbox.container(request.container_id)
        if request.format == "json":
            listed = json.dumps(await container.pids())
        elif request.format == "table":
            if list(request.args) not in ([], ["-ef"]):
                raise Unsupported(f"ListProcesses: ps {' '.join(request.args)}: only -ef is known in this guest")
            listed = await container.inspect(ps.table)
        else:
            raise StatusError(StatusCode.UNKNOWN, "invalid format option")
        return agent_pb2.ListProcessesResponse(process_list=listed.encode())

    async def ExecProcess(self, request: agent_pb2.ExecProcessRequest) -> Empty:
        await self._exec(request)
        return EMPTY

    async def SignalProcess(self, request: agent_pb2.SignalProcessRequest) -> Empty:
        self._need_sandbox("Sandbox not started, impossible to signal the container")
        try:
            container = self._sandbox.container(request.container_id)
        except ContainerNotFound as error:
            raise StatusError(
                StatusCode.FAILED_PRECONDITION,
                f"Could not signal process {request.exec_id}: rpc error: "
                f"code = NotFound desc = Container {request.container_id} not found",
            ) from error
        check_signal(request.signal)
        if container.status == STOPPED:
            return EMPTY  # it has already stopped
        if not request.exec_id or container.status == PAUSED:  # one of them would not hear it
            await container.signal_all(request.signal)
            return EMPTY
        try:
            await container.signal(request.exec_id, request.signal)
        except ProcessNotFound as error:
            raise StatusError(
                StatusCode.NOT_FOUND,
                "Could not signal process: rpc error: code = NotFound desc = "
                f"Process {request.exec_id} not found (container {request.container_id})",
            ) from error
        except ProcessExited:
            pass  # it has just exited: no host should fail because of that
        return EMPTY

    async def ReadStdout(self, request: agent_pb2.ReadStreamRequest) -> list[bytes]:
        return read_response(await self._process(request).read_stdout(request.len))

    async def ReadStderr(self, request: agent_pb2.ReadStreamRequest) -> list[bytes]:
        return read_response(await self._process(request).read_stderr(request.len))

    async def WriteStdin(self, request: agent_pb2.WriteStreamRequest) -> agent_pb2.WriteStreamResponse:
        return agent_pb2.WriteStreamResponse(len=await self._process(request).write(request.data))

    def _need_sandbox(self, text: str = "Sandbox not started") -> None:
        if not self._sandbox.running:
            raise StatusError(StatusCode.FAILED_PRECONDITION, text)

    def _container(self, request: OfContainer) -> Container:
        self._need_sandbox()
        return super()._container(request)

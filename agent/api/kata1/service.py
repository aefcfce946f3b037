"""grpc.AgentService: each method checks its request, calls the model and answers."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

from google.protobuf import empty_pb2

from caisson.agent.api import stats
from caisson.agent.api.kata1 import oci
from caisson.agent.api.status import StatusError
from caisson.agent.base.errors import (
    ContainerNotFound,
    InvalidArgument,
    ProcessExited,
    ProcessNotFound,
    Unsupported,
)
from caisson.agent.guest import details, devices, modules, ps, storage
from caisson.agent.libcontainer.config.resources import Resources
from caisson.agent.libcontainer.config.spec import Process as ProcessSpec
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.model.container import Container
from caisson.agent.model.process import Process
from caisson.agent.model.sandbox import Sandbox
from caisson.agent.rpc.codes import StatusCode
from caisson.proto.contract import VERSION
from caisson.proto.kata1 import agent_pb2

EMPTY = empty_pb2.Empty()


class AgentService:
    """The methods, by their names on the wire.  What is not here yet answers UNIMPLEMENTED."""

    def __init__(self, sandbox: Sandbox, *, init: bool) -> None:
        self._sandbox = sandbox
        self._init = init

    # The sandbox and the guest

    async def CreateSandbox(self, request: Any) -> Any:
        for module in request.kernel_modules:
            await asyncio.to_thread(modules.load, module.name, tuple(module.parameters))
        await self._sandbox.start(
            request.sandbox_id,
            request.hostname,
            hook_path=request.guest_hook_path,
            shared_pids=request.sandbox_pidns,
            dns=request.dns,
            storages=_storages(request),
        )
        return EMPTY

    async def DestroySandbox(self, request: Any) -> Any:
        await self._sandbox.destroy()
        return EMPTY

    async def GetGuestDetails(self, request: Any) -> Any:
        answer = agent_pb2.GuestDetailsResponse(
            agent_details=agent_pb2.AgentDetails(
                version=VERSION,
                init_daemon=self._init,
                supports_seccomp=details.supports_seccomp(),
                device_handlers=devices.TYPES,
                storage_handlers=storage.DRIVERS,
            )
        )
        if request.mem_block_size:
            answer.mem_block_size_bytes = details.memory_block_size()
        if request.mem_hotplug_probe:
            answer.support_mem_hotplug_probe = details.memory_probe()
        return answer

    # Containers

    async def CreateContainer(self, request: Any) -> Any:
        self._need_sandbox("Sandbox not started, impossible to run a new container")
        if not request.HasField("OCI") or not request.OCI.HasField("Process"):
            raise InvalidArgument("CreateContainer needs OCI and OCI.Process")
        if request.agent_pidns:
            raise Unsupported("CreateContainer: agent_pidns is not supported: containers do not see the agent")
        if request.sandbox_pidns and not self._sandbox.shares_pids:
            raise Unsupported("CreateContainer: sandbox_pidns needs a sandbox that was created with it")
        spec = Spec.from_json(oci.spec_to_json(request.OCI))
        plugged = [devices.GuestDevice(one.id, one.type, one.vm_path, one.container_path) for one in request.devices]
        await self._sandbox.create(request.container_id, request.exec_id, spec, _storages(request), plugged)
        return EMPTY

    async def StartContainer(self, request: Any) -> Any:
        await self._container(request).start()
        return EMPTY

    async def RemoveContainer(self, request: Any) -> Any:
        await self._sandbox.remove(request.container_id, request.timeout or None)
        return EMPTY

    async def PauseContainer(self, request: Any) -> Any:
        await self._sandbox.container(request.container_id).pause()
        return EMPTY

    async def ResumeContainer(self, request: Any) -> Any:
        await self._sandbox.container(request.container_id).resume()
        return EMPTY

    async def UpdateContainer(self, request: Any) -> Any:
        self._sandbox.container(request.container_id)
        if not request.HasField("resources"):
            raise StatusError(StatusCode.UNKNOWN, "Resources in the request are nil")
        wanted = Resources.from_json(oci.resources_to_json(request.resources))
        await self._sandbox.update(request.container_id, wanted)
        return EMPTY

    async def StatsContainer(self, request: Any) -> Any:
        used = await self._sandbox.container(request.container_id).stats()
        return agent_pb2.StatsContainerResponse(cgroup_stats=stats.to_wire(used))

    async def GetOOMEvent(self, request: Any) -> Any:
        return agent_pb2.OOMEvent(container_id=await self._sandbox.oom_events.next())

    async def ListProcesses(self, request: Any) -> Any:
        container = self._sandbox.container(request.container_id)
        if request.format == "json":
            listed = json.dumps(container.pids())
        elif request.format == "table":
            if list(request.args) not in ([], ["-ef"]):
                raise Unsupported(f"ListProcesses: ps {' '.join(request.args)}: only -ef is known in this guest")
            listed = ps.table(container.pids())
        else:
            raise StatusError(StatusCode.UNKNOWN, "invalid format option")
        return agent_pb2.ListProcessesResponse(process_list=listed.encode())

    async def ExecProcess(self, request: Any) -> Any:
        container = self._container(request)
        if not request.HasField("process"):
            raise InvalidArgument("ExecProcess needs a process")
        if not request.exec_id:
            raise InvalidArgument("ExecProcess needs an exec_id")
        await container.exec(request.exec_id, ProcessSpec.from_json(oci.exec_to_json(request.process)))
        return EMPTY

    async def SignalProcess(self, request: Any) -> Any:
        self._need_sandbox("Sandbox not started, impossible to signal the container")
        try:
            container = self._sandbox.container(request.container_id)
        except ContainerNotFound as error:
            raise StatusError(
                StatusCode.FAILED_PRECONDITION,
                f"Could not signal process {request.exec_id}: rpc error: "
                f"code = NotFound desc = Container {request.container_id} not found",
            ) from error
        if not 0 <= request.signal <= signal.SIGRTMAX:
            raise InvalidArgument(f"{request.signal} is not a signal")
        if container.status == "stopped":
            return EMPTY  # what was to be stopped has stopped
        if not request.exec_id or container.status == "paused":  # one of them would not hear it
            await container.signal_all(request.signal)
            return EMPTY
        try:
            container.signal(request.exec_id, request.signal)
        except ProcessNotFound as error:
            raise StatusError(
                StatusCode.NOT_FOUND,
                "Could not signal process: rpc error: code = NotFound desc = "
                f"Process {request.exec_id} not found (container {request.container_id})",
            ) from error
        except ProcessExited:
            pass  # it ended a moment ago: no host should fail over that
        return EMPTY

    # Processes and their streams

    async def WaitProcess(self, request: Any) -> Any:
        return agent_pb2.WaitProcessResponse(status=await self._process(request).wait())

    async def ReadStdout(self, request: Any) -> list[bytes]:
        return _read_response(await self._process(request).read_stdout(request.len))

    async def ReadStderr(self, request: Any) -> list[bytes]:
        return _read_response(await self._process(request).read_stderr(request.len))

    async def WriteStdin(self, request: Any) -> Any:
        return agent_pb2.WriteStreamResponse(len=await self._process(request).write(request.data))

    async def CloseStdin(self, request: Any) -> Any:
        await self._process(request).close_stdin()
        return EMPTY

    async def TtyWinResize(self, request: Any) -> Any:
        self._process(request).resize(request.row, request.column)
        return EMPTY

    def _need_sandbox(self, text: str = "Sandbox not started") -> None:
        if not self._sandbox.running:
            raise StatusError(StatusCode.FAILED_PRECONDITION, text)

    def _container(self, request: Any) -> Container:
        self._need_sandbox()
        return self._sandbox.container(request.container_id)

    def _process(self, request: Any) -> Process:
        return self._container(request).process(request.exec_id)


def _read_response(data: bytes) -> list[bytes]:
    """A ReadStreamResponse as it is on the wire.  Protobuf would copy a MiB twice to put two bytes before it."""
    if not data:
        return []
    head = bytearray([agent_pb2.ReadStreamResponse.DATA_FIELD_NUMBER << 3 | 2])  # a field of bytes: their count, a
    size = len(data)  # varint, and they themselves (protobuf.dev, Encoding)
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return [bytes(head), data]


def _storages(request: Any) -> list[storage.Storage]:
    return [
        storage.Storage(
            driver=one.driver,
            source=one.source,
            fstype=one.fstype,
            mount_point=one.mount_point,
            options=tuple(one.options),
        )
        for one in request.storages
    ]

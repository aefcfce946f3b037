"""grpc.AgentService: methods on containers and processes that are the same in both generations of the API.

A generation's own service derives from this and adds the methods that differ.  A method checks its request, calls the
model and answers.
"""

from __future__ import annotations

import asyncio
import signal

from google.protobuf import empty_pb2

from caisson.agent.api import conversions
from caisson.agent.base.errors import InvalidArgument
from caisson.agent.guest import details
from caisson.agent.guest.devices import GuestDevice
from caisson.agent.guest.storage import Storage
from caisson.agent.libcontainer.config.process import Process as ProcessSpec
from caisson.agent.libcontainer.config.resources import Resources
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.rpc import wire
from caisson.proto.contract import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType
    from typing import Any, ClassVar, Protocol

    from caisson.agent.model.container import Container
    from caisson.agent.model.process import Process
    from caisson.agent.model.sandbox import Sandbox
    from caisson.proto.kata1 import agent_pb2 as kata1
    from caisson.proto.kata3 import agent_pb2 as kata3

    class OfContainer(Protocol):
        """A request about a container."""

        container_id: str

    class OfProcess(OfContainer, Protocol):
        """A request about a process."""

        exec_id: str

    CreateContainerRequest = kata1.CreateContainerRequest | kata3.CreateContainerRequest


EMPTY = empty_pb2.Empty()


class ContainerService:
    """``messages`` is the generated module of the generation; the other constants are the values that differ between
    them.
    """

    messages: ClassVar[ModuleType]

    #: Fields of a process that joins a container; the others are those of the container's init process.
    EXEC_FIELDS: ClassVar[tuple[str, ...]]

    DEVICE_HANDLERS: ClassVar[tuple[str, ...]]
    STORAGE_HANDLERS: ClassVar[tuple[str, ...]]

    def __init__(self, sandbox: Sandbox, *, init: bool) -> None:
        """``init`` is whether the agent is PID 1."""
        self._sandbox = sandbox
        self._init = init

    async def GetGuestDetails(self, request: kata1.GuestDetailsRequest | kata3.GuestDetailsRequest) -> Any:
        answer = self.messages.GuestDetailsResponse(
            agent_details=self.messages.AgentDetails(
                version=VERSION,
                init_daemon=self._init,
                supports_seccomp=details.supports_seccomp(),
                device_handlers=self.DEVICE_HANDLERS,
                storage_handlers=self.STORAGE_HANDLERS,
            )
        )
        if request.mem_block_size:
            answer.mem_block_size_bytes = details.memory_block_size()
        if request.mem_hotplug_probe:
            answer.support_mem_hotplug_probe = details.memory_probe()
        return answer

    # Containers

    async def StartContainer(self, request: OfContainer) -> empty_pb2.Empty:
        await self._container(request).start()
        return EMPTY

    async def RemoveContainer(
        self, request: kata1.RemoveContainerRequest | kata3.RemoveContainerRequest
    ) -> empty_pb2.Empty:
        await self._sandbox.remove(request.container_id, request.timeout or None)
        return EMPTY

    async def PauseContainer(self, request: OfContainer) -> empty_pb2.Empty:
        await self._sandbox.container(request.container_id).pause()
        return EMPTY

    async def ResumeContainer(self, request: OfContainer) -> empty_pb2.Empty:
        await self._sandbox.container(request.container_id).resume()
        return EMPTY

    async def StatsContainer(self, request: OfContainer) -> Any:
        used = await self._sandbox.container(request.container_id).stats()
        answer = self.messages.StatsContainerResponse()
        answer.cgroup_stats.SetInParent()
        conversions.fill(answer.cgroup_stats, used)
        return answer

    async def GetOOMEvent(self, request: kata1.GetOOMEventRequest | kata3.GetOOMEventRequest) -> Any:
        return self.messages.OOMEvent(container_id=await self._sandbox.oom_events.next())

    # Processes and their streams

    async def _exec(self, request: kata1.ExecProcessRequest | kata3.ExecProcessRequest) -> None:
        container = self._container(request)
        if not request.HasField("process"):
            raise InvalidArgument("ExecProcess needs a process")
        if not request.exec_id:
            raise InvalidArgument("ExecProcess needs an exec_id")
        process = ProcessSpec.from_json(conversions.exec_to_json(request.process, self.EXEC_FIELDS))
        await container.exec(request.exec_id, process)

    async def WaitProcess(self, request: OfProcess) -> Any:
        return self.messages.WaitProcessResponse(status=await self._process(request).wait())

    async def CloseStdin(self, request: OfProcess) -> empty_pb2.Empty:
        await self._process(request).close_stdin()
        return EMPTY

    async def TtyWinResize(self, request: kata1.TtyWinResizeRequest | kata3.TtyWinResizeRequest) -> empty_pb2.Empty:
        self._process(request).resize(request.row, request.column)
        return EMPTY

    def _container(self, request: OfContainer) -> Container:
        return self._sandbox.container(request.container_id)

    def _process(self, request: OfProcess) -> Process:
        return self._container(request).process(request.exec_id)

    async def _update(self, request: kata1.UpdateContainerRequest | kata3.UpdateContainerRequest) -> None:
        await self._sandbox.update(
            request.container_id, Resources.from_json(conversions.resources_to_json(request.resources))
        )


def spec_of(request: CreateContainerRequest) -> Spec:
    """Return the specification in a request.  Raises InvalidArgument, or SpecError."""
    if not request.HasField("OCI") or not request.OCI.HasField("Process"):
        raise InvalidArgument("CreateContainer needs OCI and OCI.Process")
    return Spec.from_json(conversions.spec_to_json(request.OCI))


def devices_of(request: CreateContainerRequest) -> list[GuestDevice]:
    """Return the devices that a request names."""
    return [GuestDevice(one.id, one.type, one.vm_path, one.container_path) for one in request.devices]


def storage_of(one: kata1.Storage | kata3.Storage) -> Storage:
    """Return the fields of a storage that both generations have."""
    return Storage(
        driver=one.driver,
        source=one.source,
        fstype=one.fstype,
        mount_point=one.mount_point,
        options=tuple(one.options),
        driver_options=tuple(one.driver_options),
    )


def check_signal(number: int) -> None:
    """Check a signal number.  Raises InvalidArgument."""
    if not 0 <= number <= signal.SIGRTMAX:
        raise InvalidArgument(f"{number} is not a signal")


async def load_modules(wanted: Iterable[kata1.KernelModule | kata3.KernelModule]) -> None:
    """Load kernel modules, with their parameters.  Raises ModuleNotLoaded or MissingArgument."""
    from caisson.agent.guest import modules

    for module in wanted:
        await asyncio.to_thread(modules.load, module.name, tuple(module.parameters))


#: The only field of a ReadStreamResponse: bytes.
DATA_FIELD = 1


def read_response(data: bytes) -> list[bytes]:
    """Return a ReadStreamResponse as it is on the wire.  Protobuf would copy 1 MiB twice to prepend two bytes."""
    return [wire.prefix(DATA_FIELD, len(data)), data] if data else []

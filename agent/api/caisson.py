"""caisson.Guest: what this agent offers beside Kata's API."""

from __future__ import annotations

import asyncio
import json
from functools import cached_property

from google.protobuf.message import DecodeError

from caisson.agent.api.containers import EMPTY
from caisson.agent.base.aio import run_to_completion
from caisson.agent.base.errors import InvalidArgument
from caisson.agent.guest.identity import identify
from caisson.proto.caisson import caisson_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from google.protobuf.empty_pb2 import Empty

    from caisson.agent.guest.container_mounts import ContainerMounts
    from caisson.agent.libcontainer.config.spec import Spec
    from caisson.agent.model.sandbox import Sandbox


class CaissonService:
    """For clients of our own: containers that are made on first use, clones of a snapshot, mounts in containers."""

    def __init__(self, sandbox: Sandbox, hotplug_timeout: float) -> None:
        """A device that is plugged in is waited for ``hotplug_timeout`` seconds."""
        self._sandbox = sandbox
        self._hotplug_timeout = hotplug_timeout

    async def EnsureRunning(self, request: caisson_pb2.EnsureRunningRequest) -> caisson_pb2.EnsureRunningResponse:
        created = await self._sandbox.ensure_running(request.container_id, lambda: _spec(request.spec))
        return caisson_pb2.EnsureRunningResponse(created=created)

    async def CreateContainer(self, request: caisson_pb2.CreateContainerRequest) -> caisson_pb2.CreateContainerResponse:
        from caisson.agent.guest.storage import Storage
        from caisson.agent.libcontainer.config.spec import Spec, ignoring_unknown

        storages = [
            Storage(
                driver=one.driver,
                source=one.source,
                fstype=one.fstype,
                mount_point=one.mount_point,
                options=tuple(one.options),
                driver_options=(),
            )
            for one in request.storages
        ]
        answer = caisson_pb2.CreateContainerResponse()
        document = _document(request.config)
        spec = ignoring_unknown(lambda: Spec.from_json(document), answer.warnings.append)
        await self._sandbox.create(request.container_id, request.container_id, spec, storages, [])
        return answer

    async def ExecProcess(self, request: caisson_pb2.ExecProcessRequest) -> Empty:
        from caisson.agent.libcontainer.config.spec import Process

        process = Process.from_json(_document(request.process))
        if not request.exec_id:
            raise InvalidArgument("ExecProcess needs an exec_id")
        await self._sandbox.container(request.container_id).exec(request.exec_id, process)
        return EMPTY

    async def Identify(self, request: caisson_pb2.IdentifyRequest) -> Empty:
        identify(request.hostname, request.machine_id)
        return EMPTY

    async def LoadModule(self, request: caisson_pb2.LoadModuleRequest) -> Empty:
        from caisson.agent.guest import modules

        await asyncio.to_thread(modules.need, (request.name,))
        return EMPTY

    @cached_property
    def _mounts(self) -> ContainerMounts:
        from caisson.agent.guest.container_mounts import ContainerMounts

        return ContainerMounts(self._sandbox.container, self._hotplug_timeout)

    async def Mount(self, request: caisson_pb2.MountRequest) -> Empty:
        where = request.container_id, request.source, request.fstype, request.mount_point
        await run_to_completion(self._mounts.mount(*where, tuple(request.options)))
        return EMPTY

    async def Unmount(self, request: caisson_pb2.UnmountRequest) -> Empty:
        await run_to_completion(self._mounts.unmount(request.source))
        return EMPTY


def _document(data: bytes) -> object:
    """Decode JSON.  Raises InvalidArgument."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"invalid JSON: {error}") from None


def _spec(data: bytes) -> Spec:
    """Decode a config.json, or a grpc.Spec, which cannot begin as JSON does.  Raises InvalidArgument, or SpecError."""
    from caisson.agent.api.oci import spec_to_json
    from caisson.agent.libcontainer.config.spec import Spec
    from caisson.proto.kata1 import oci_pb2

    if data.startswith(b"{"):
        return Spec.from_json(_document(data))
    try:
        return Spec.from_json(spec_to_json(oci_pb2.Spec.FromString(data)))
    except DecodeError:
        raise InvalidArgument("EnsureRunning: spec is not a grpc.Spec") from None

"""caisson.Guest: what this agent offers beside Kata's API."""

from __future__ import annotations

import asyncio
import json
from functools import cached_property

from google.protobuf.message import DecodeError

from caisson.agent.api.containers import EMPTY, check_signal
from caisson.agent.base.aio import run_to_completion
from caisson.agent.base.boot_timestamps import now
from caisson.agent.base.errors import InvalidArgument, NotFound, OutputNotKept, SandboxExists
from caisson.agent.guest.identity import identify
from caisson.agent.libcontainer.state import STOPPED
from caisson.proto.caisson import caisson_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from google.protobuf.empty_pb2 import Empty

    from caisson.agent.base.boot_timestamps import BootTimestamps
    from caisson.agent.guest.storage import Storage
    from caisson.agent.libcontainer.config.spec import Spec
    from caisson.agent.model.container_mounts import ContainerMounts
    from caisson.agent.model.output_log import OutputLog
    from caisson.agent.model.sandbox import Sandbox


#: Maximum bytes of a container's output to keep.
MAX_LOG = 16 << 20


class CaissonService:
    """Methods for Caisson's clients: containers created on first use, clones of a snapshot, mounts in containers."""

    def __init__(self, sandbox: Sandbox, hotplug_timeout: float, timestamps: BootTimestamps) -> None:
        """Wait ``hotplug_timeout`` seconds for a device that is being plugged in."""
        self._sandbox = sandbox
        self._hotplug_timeout = hotplug_timeout
        self._timestamps = timestamps
        self._logs: dict[str, OutputLog] = {}

    async def EnsureSandbox(self, request: caisson_pb2.EnsureSandboxRequest) -> caisson_pb2.EnsureSandboxResponse:
        try:
            await self._sandbox.start(request.sandbox_id, request.hostname, dns=request.dns)
        except SandboxExists:
            return caisson_pb2.EnsureSandboxResponse(created=False)
        return caisson_pb2.EnsureSandboxResponse(created=True)

    async def DestroySandbox(self, request: caisson_pb2.DestroySandboxRequest) -> Empty:
        await self._sandbox.destroy()
        return EMPTY

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

    async def RecreateContainer(self, request: caisson_pb2.RecreateContainerRequest) -> Empty:
        await self._sandbox.recreate(request.container_id)
        return EMPTY

    async def ExecProcess(self, request: caisson_pb2.ExecProcessRequest) -> Empty:
        from caisson.agent.libcontainer.config.process import Process

        process = Process.from_json(_document(request.process))
        if not request.exec_id:
            raise InvalidArgument("ExecProcess needs an exec_id")
        await self._sandbox.container(request.container_id).exec(request.exec_id, process)
        return EMPTY

    async def SignalContainer(self, request: caisson_pb2.SignalContainerRequest) -> Empty:
        container = self._sandbox.container(request.container_id)
        check_signal(request.signal)
        if container.status != STOPPED:  # it has already stopped
            await container.signal_all(request.signal)
        return EMPTY

    async def ListProcesses(self, request: caisson_pb2.ListProcessesRequest) -> caisson_pb2.ListProcessesResponse:
        from caisson.agent.guest import ps

        container = self._sandbox.container(request.container_id)
        pids, table = await container.inspect(lambda pids: (pids, ps.table(pids)))
        return caisson_pb2.ListProcessesResponse(pids=pids, table=table, status=container.status)

    async def KeepLog(self, request: caisson_pb2.KeepLogRequest) -> Empty:
        from caisson.agent.model.output_log import OutputLog

        if not 0 < request.max_bytes <= MAX_LOG:
            raise InvalidArgument(f"KeepLog: max_bytes {request.max_bytes}: must be 1 to {MAX_LOG}")
        process = self._sandbox.container(request.container_id).process(request.container_id)
        self._forget_logs()
        if request.container_id not in self._logs:
            self._logs[request.container_id] = OutputLog(process, request.max_bytes)
        return EMPTY

    async def ReadLog(self, request: caisson_pb2.ReadLogRequest) -> caisson_pb2.ReadLogResponse:
        self._sandbox.container(request.container_id)
        self._forget_logs()
        log = self._logs.get(request.container_id)
        if log is None:
            raise OutputNotKept(container_id=request.container_id)
        entries, ended = await log.read(request.begin, follow=request.follow)
        answer = caisson_pb2.ReadLogResponse(ended=ended)
        for one in entries:
            answer.entries.add(number=one.number, time=one.time, stream=one.stream, data=one.data)
        return answer

    def _forget_logs(self) -> None:
        """Drop the logs of containers that were removed, or replaced by others of the same name."""
        for container_id, log in list(self._logs.items()):
            try:
                there = self._sandbox.container(container_id).process(container_id) is log.process
            except NotFound:
                there = False
            if not there:
                del self._logs[container_id]
                log.close()

    async def Identify(self, request: caisson_pb2.IdentifyRequest) -> Empty:
        identify(request.hostname, request.machine_id)
        return EMPTY

    async def GetBootTimes(self, request: caisson_pb2.GetBootTimesRequest) -> caisson_pb2.BootTimes:
        if request.only_now:
            return caisson_pb2.BootTimes(now=now())
        from caisson.agent.guest.kernellog import read_kernel_log

        times = caisson_pb2.BootTimes(kernel_log=read_kernel_log())
        for place, reached in self._timestamps.stages:
            times.marks.add(place=place, reached=reached)
        for module, began, ended in self._timestamps.imports:
            times.imports.add(module=module, began=began, ended=ended)
        times.now = now()
        return times

    async def LoadModule(self, request: caisson_pb2.LoadModuleRequest) -> Empty:
        from caisson.agent.guest import modules

        await asyncio.to_thread(modules.load_available, (request.name,))
        return EMPTY

    @cached_property
    def _mounts(self) -> ContainerMounts:
        from caisson.agent.model.container_mounts import ContainerMounts

        return ContainerMounts(self._sandbox.container, self._hotplug_timeout)

    async def Mount(self, request: caisson_pb2.MountRequest) -> Empty:
        if not request.container_id:
            await run_to_completion(self._sandbox.mount(_share(request)))
            return EMPTY
        where = request.container_id, request.source, request.fstype, request.mount_point
        await run_to_completion(self._mounts.mount(*where, tuple(request.options)))
        return EMPTY

    async def Unmount(self, request: caisson_pb2.UnmountRequest) -> Empty:
        await run_to_completion(self._mounts.unmount(request.source))
        return EMPTY


def _share(request: caisson_pb2.MountRequest) -> Storage:
    """Return the storage for a share of the host's.  Raises InvalidArgument."""
    from caisson.agent.guest.storage import Storage

    drivers = {"virtiofs": "virtio-fs", "9p": "9p"}
    if request.fstype not in drivers:
        raise InvalidArgument(f"Mount: {request.fstype!r}: outside of containers shares are mounted: virtiofs or 9p")
    return Storage(drivers[request.fstype], request.source, request.fstype, request.mount_point, tuple(request.options))


def _document(data: bytes) -> object:
    """Decode JSON.  Raises InvalidArgument."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"invalid JSON: {error}") from None


def _spec(data: bytes) -> Spec:
    """Decode a config.json, or a grpc.Spec, which cannot begin as JSON does.  Raises InvalidArgument, or SpecError."""
    from caisson.agent.api.conversions import spec_to_json
    from caisson.agent.libcontainer.config.spec import Spec
    from caisson.proto.kata1 import oci_pb2

    if data.startswith(b"{"):
        return Spec.from_json(_document(data))
    try:
        return Spec.from_json(spec_to_json(oci_pb2.Spec.FromString(data)))
    except DecodeError:
        raise InvalidArgument("EnsureRunning: spec is not a grpc.Spec") from None

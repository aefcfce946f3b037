"""grpc.AgentService of Kata 1.x: methods on the guest itself: network, hot-plug, tracing."""

from __future__ import annotations

import asyncio

from caisson.agent.api.containers import EMPTY
from caisson.agent.api.guest import GuestService as Common
from caisson.agent.base.errors import InvalidArgument, ModelError
from caisson.agent.guest import hotplug
from caisson.proto.kata1 import agent_pb2, types_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import ModuleType
    from typing import Any, ClassVar

    from google.protobuf.empty_pb2 import Empty

    from caisson.agent.base.log import Log
    from caisson.agent.base.tracing import Tracing
    from caisson.agent.guest.files import Files


class GuestService(Common):
    """Addresses and routes are replaced by those given; CPU counts are relative to those online."""

    messages: ClassVar[ModuleType] = agent_pb2
    types: ClassVar[ModuleType] = types_pb2
    REMOVE_UNLISTED = True
    REPLACE_NEIGHBOURS = False
    INTERFACE_PATH_FIELD = "pciPath"
    DEFAULT_ROUTES: ClassVar[dict[int, str]] = {4: "", 6: ""}

    def __init__(
        self, hotplug_timeout: float, files: Files, log: Log, cpus_came: Callable[[], object], tracing: Tracing
    ) -> None:
        super().__init__(hotplug_timeout, files, cpus_came)
        self._log = log
        self._tracing = tracing
        self._background: set[asyncio.Task[None]] = set()

    async def StartTracing(self, request: agent_pb2.StartTracingRequest) -> Empty:
        await asyncio.to_thread(self._tracing.start)  # imports a hundred modules
        return EMPTY

    async def StopTracing(self, request: agent_pb2.StopTracingRequest) -> Empty:
        await asyncio.to_thread(self._tracing.stop)
        return EMPTY

    async def UpdateRoutes(self, request: agent_pb2.UpdateRoutesRequest) -> agent_pb2.Routes:
        from caisson.agent.guest.network import Route

        if not request.HasField("routes"):
            raise InvalidArgument("Need network routes")
        await self._network.update_routes(
            [
                Route(destination=one.dest, gateway=one.gateway, device=one.device, source=one.source, scope=one.scope)
                for one in request.routes.Routes
            ]
        )
        return request.routes

    async def OnlineCPUMem(self, request: agent_pb2.OnlineCPUMemRequest) -> Empty:
        hotplug.check_count(request.nb_cpus, request.cpu_only)
        work = self._online(request.nb_cpus, request.cpu_only)
        if request.wait:
            await work
        else:
            task = asyncio.ensure_future(self._without_answer(work))
            self._background.add(task)
            task.add_done_callback(self._background.discard)
        return EMPTY

    async def _online(self, cpus: int, cpu_only: bool) -> None:
        if cpus:
            await hotplug.online_cpus(cpus)
        if not cpu_only:
            await asyncio.to_thread(hotplug.online_memory)  # large blocks take the kernel a while
        if cpus:
            self._cpus_came()

    async def _without_answer(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except ModelError as error:
            self._log("error", "what was plugged in could not be brought into use", error=str(error))

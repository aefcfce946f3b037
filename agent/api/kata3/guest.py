"""grpc.AgentService of Kata 3.x: methods on the guest itself: network, memory, volumes, metrics."""

from __future__ import annotations

import asyncio
from functools import cached_property

from caisson.agent.api.containers import EMPTY
from caisson.agent.api.guest import GuestService as Common
from caisson.agent.api.status import StatusError
from caisson.agent.base.errors import InvalidArgument
from caisson.agent.guest import hotplug
from caisson.agent.rpc.codes import StatusCode
from caisson.proto.kata3 import agent_pb2, csi_pb2, types_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import ClassVar, NoReturn

    from google.protobuf.empty_pb2 import Empty

    from caisson.agent.guest.blockdevices import BlockDevices
    from caisson.agent.guest.files import Files
    from caisson.agent.guest.metrics import Metrics
    from caisson.agent.libcontainer.process.children import Children


class GuestService(Common):
    """Addresses and routes are added to existing ones; CPU counts are totals."""

    messages: ClassVar[ModuleType] = agent_pb2
    types: ClassVar[ModuleType] = types_pb2
    REMOVE_UNLISTED = False
    REPLACE_NEIGHBOURS = True
    INTERFACE_PATH_FIELD = "devicePath"
    DEFAULT_ROUTES: ClassVar[dict[int, str]] = {4: "0.0.0.0", 6: "::"}

    def __init__(
        self,
        hotplug_timeout: float,
        files: Files,
        cpus_came: Callable[[], object],
        *,
        blocks: BlockDevices,
        children: Children,
    ) -> None:
        super().__init__(hotplug_timeout, files, cpus_came)
        self._blocks = blocks
        self._children = children

    # Network

    async def UpdateRoutes(self, request: agent_pb2.UpdateRoutesRequest) -> agent_pb2.Routes:
        from caisson.agent.guest.network import Route

        if not request.HasField("routes"):
            raise InvalidArgument("Need network routes")
        wanted = [
            Route(
                destination=one.dest,
                gateway=one.gateway,
                device=one.device,
                source=one.source,
                scope=one.scope,
                version=6 if one.family == types_pb2.v6 else 4,
                flags=one.flags,
                mtu=one.mtu,
            )
            for one in request.routes.Routes
        ]
        await self._network.update_routes(wanted, only=self.REMOVE_UNLISTED)
        answer: agent_pb2.Routes = await self.ListRoutes(agent_pb2.ListRoutesRequest())
        return answer

    async def GetIPTables(self, request: agent_pb2.GetIPTablesRequest) -> agent_pb2.GetIPTablesResponse:
        from caisson.agent.guest.packetfilter import PacketFilter

        rules = await PacketFilter(self._children).save(ipv6=request.is_ipv6)
        return agent_pb2.GetIPTablesResponse(data=rules)

    async def SetIPTables(self, request: agent_pb2.SetIPTablesRequest) -> agent_pb2.SetIPTablesResponse:
        from caisson.agent.guest.packetfilter import PacketFilter

        said = await PacketFilter(self._children).restore(request.data, ipv6=request.is_ipv6)
        return agent_pb2.SetIPTablesResponse(data=said)

    # CPUs and memory

    async def OnlineCPUMem(self, request: agent_pb2.OnlineCPUMemRequest) -> Empty:
        if request.nb_cpus:
            await hotplug.online_total(request.nb_cpus)
        if not request.cpu_only:
            await asyncio.to_thread(hotplug.online_memory)  # large blocks take the kernel a while
        if request.nb_cpus:
            self._cpus_came()
        return EMPTY

    async def AddSwap(self, request: agent_pb2.AddSwapRequest) -> Empty:
        path = "/".join(f"{slot:02x}" for slot in request.PCIPath)
        await self._swap_to(await self._blocks.pci(path))
        return EMPTY

    async def AddSwapPath(self, request: agent_pb2.AddSwapPathRequest) -> Empty:
        await self._swap_to(request.path)
        return EMPTY

    async def _swap_to(self, device: str) -> None:
        from caisson.agent.guest.volumes import swap_on

        await asyncio.to_thread(swap_on, device)

    async def MemAgentMemcgSet(self, request: agent_pb2.MemAgentMemcgConfig) -> Empty:
        self._refuse_memory_agent()

    async def MemAgentCompactSet(self, request: agent_pb2.MemAgentCompactConfig) -> Empty:
        self._refuse_memory_agent()

    @staticmethod
    def _refuse_memory_agent() -> NoReturn:
        raise StatusError(StatusCode.INTERNAL, "mem-agent is disabled")

    # Volumes

    async def GetVolumeStats(self, request: agent_pb2.VolumeStatsRequest) -> csi_pb2.VolumeStatsResponse:
        from caisson.agent.guest.volumes import usage

        answer = csi_pb2.VolumeStatsResponse()
        found = await asyncio.to_thread(usage, request.volume_guest_path)
        for unit, used in zip((csi_pb2.VolumeUsage.BYTES, csi_pb2.VolumeUsage.INODES), found, strict=True):
            answer.usage.add(available=used.available, total=used.total, used=used.used, unit=unit)
        answer.volume_condition.message = "OK"
        return answer

    async def ResizeVolume(self, request: agent_pb2.ResizeVolumeRequest) -> Empty:
        raise StatusError(StatusCode.UNIMPLEMENTED, "resize_volume is not implemented in this agent")

    async def RemoveStaleVirtiofsShareMounts(self, request: agent_pb2.RemoveStaleVirtiofsShareMountsRequest) -> Empty:
        from caisson.agent.guest.volumes import refresh_shares

        await asyncio.to_thread(refresh_shares)
        return EMPTY

    # Others

    @cached_property
    def _metrics(self) -> Metrics:
        from caisson.agent.guest.metrics import Metrics

        return Metrics()

    async def GetMetrics(self, request: agent_pb2.GetMetricsRequest) -> agent_pb2.Metrics:
        return agent_pb2.Metrics(metrics=await asyncio.to_thread(self._metrics.text))

    async def SetPolicy(self, request: agent_pb2.SetPolicyRequest) -> Empty:
        # A pod that has a policy must fail, not run without it.
        raise StatusError(StatusCode.UNIMPLEMENTED, "SetPolicy: policies are not supported by this agent")

"""The methods of grpc.AgentService that are about the guest itself: network, hot-plug, clock, files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cached_property
from typing import Any

from google.protobuf import empty_pb2

from caisson.agent.base.errors import InvalidArgument, ModelError
from caisson.agent.base.log import Log
from caisson.agent.base.tracing import Tracing
from caisson.agent.guest import clock, hotplug
from caisson.agent.guest.files import Files, Piece
from caisson.proto.kata1 import agent_pb2, types_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.guest.network import Network

EMPTY = empty_pb2.Empty()


class GuestService:
    """None of these needs a sandbox: hosts set the network up before there is one."""

    def __init__(
        self, hotplug_timeout: float, files: Files, log: Log, cpus_came: Callable[[], object], tracing: Tracing
    ) -> None:
        """An interface that is plugged in is waited for ``hotplug_timeout`` seconds; ``cpus_came`` is called when CPUs
        that were plugged in are in use.
        """
        self._cpus_came = cpus_came
        self._tracing = tracing
        self._hotplug_timeout = hotplug_timeout
        self._files = files
        self._log = log
        self._background: set[asyncio.Task[None]] = set()

    @cached_property
    def _network(self) -> Network:
        from caisson.agent.guest.network import Network

        return Network(self._hotplug_timeout)

    async def StartTracing(self, request: Any) -> Any:
        await asyncio.to_thread(self._tracing.start)  # imports a hundred modules
        return EMPTY

    async def StopTracing(self, request: Any) -> Any:
        await asyncio.to_thread(self._tracing.stop)
        return EMPTY

    async def UpdateInterface(self, request: Any) -> Any:
        from caisson.agent.guest.network import Address, Interface

        if not request.HasField("interface"):
            raise InvalidArgument("Need network interface")
        wanted = request.interface
        addresses = tuple(Address(one.address, _prefix(one)) for one in wanted.IPAddresses)
        interface = Interface(
            name=wanted.name, mac=wanted.hwAddr, mtu=wanted.mtu, addresses=addresses, flags=wanted.raw_flags
        )
        await self._network.update_interface(interface, plugged=bool(wanted.pciPath))
        return wanted

    async def ListInterfaces(self, request: Any) -> Any:
        found = [
            types_pb2.Interface(
                name=one.name,
                mtu=one.mtu,
                hwAddr=one.mac,
                IPAddresses=[
                    types_pb2.IPAddress(family=_family(a.version), address=a.address, mask=str(a.prefix))
                    for a in one.addresses
                ],
            )
            for one in await self._network.interfaces()
        ]
        return agent_pb2.Interfaces(Interfaces=found)

    async def UpdateRoutes(self, request: Any) -> Any:
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

    async def ListRoutes(self, request: Any) -> Any:
        found = [
            types_pb2.Route(
                dest=one.destination, gateway=one.gateway, device=one.device, source=one.source, scope=one.scope
            )
            for one in await self._network.routes()
        ]
        return agent_pb2.Routes(Routes=found)

    async def AddARPNeighbors(self, request: Any) -> Any:
        from caisson.agent.guest.network import Neighbour

        if not request.HasField("neighbors"):
            raise InvalidArgument("Need ARP neighbors")
        neighbours = []
        for one in request.neighbors.ARPNeighbors:
            if not one.HasField("toIPAddress"):
                raise InvalidArgument("an ARP neighbor needs toIPAddress")
            neighbours.append(
                Neighbour(
                    address=one.toIPAddress.address, device=one.device, mac=one.lladdr, state=one.state, flags=one.flags
                )
            )
        await self._network.add_neighbours(neighbours)
        return EMPTY

    async def OnlineCPUMem(self, request: Any) -> Any:
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
            await asyncio.to_thread(hotplug.online_memory)  # the kernel takes its time over large blocks
        if cpus:
            self._cpus_came()

    async def _without_answer(self, work: Any) -> None:
        try:
            await work
        except ModelError as error:
            self._log("error", "what was plugged in could not be brought into use", error=str(error))

    async def MemHotplugByProbe(self, request: Any) -> Any:
        await asyncio.to_thread(hotplug.probe_memory, list(request.memHotplugProbeAddr))
        return EMPTY

    async def ReseedRandomDev(self, request: Any) -> Any:
        clock.reseed(request.data)
        return EMPTY

    async def SetGuestDateTime(self, request: Any) -> Any:
        clock.set_time(request.Sec, request.Usec)
        return EMPTY

    async def CopyFile(self, request: Any) -> Any:
        self._files.write(
            Piece(
                path=request.path,
                size=request.file_size,
                offset=request.offset,
                data=request.data,
                mode=request.file_mode,
                directory_mode=request.dir_mode,
                uid=request.uid,
                gid=request.gid,
            )
        )
        return EMPTY


def _family(version: int) -> types_pb2.IPFamily:
    return types_pb2.v6 if version == 6 else types_pb2.v4


def _prefix(address: Any) -> int:
    if not (address.mask.isascii() and address.mask.isdecimal()) or int(address.mask) > 128:
        raise InvalidArgument(f'Could not parse "{address.address}/{address.mask}"')
    return int(address.mask)

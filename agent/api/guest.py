"""grpc.AgentService: methods on the guest itself that are the same in both generations of the API.

None needs a sandbox: hosts set up the network before creating one.
"""

from __future__ import annotations

import asyncio
from functools import cached_property

from caisson.agent.api.containers import EMPTY
from caisson.agent.base.errors import InvalidArgument
from caisson.agent.guest import clock, hotplug
from caisson.agent.guest.files import Piece

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any, ClassVar

    from google.protobuf.empty_pb2 import Empty

    from caisson.agent.guest.files import Files
    from caisson.agent.guest.network import Network
    from caisson.proto.kata1 import agent_pb2 as kata1
    from caisson.proto.kata1 import types_pb2 as types1
    from caisson.proto.kata3 import agent_pb2 as kata3
    from caisson.proto.kata3 import types_pb2 as types3


class GuestService:
    """``messages`` and ``types`` are the generated modules of the generation; the constants below are the values that
    differ between them.
    """

    messages: ClassVar[ModuleType]
    types: ClassVar[ModuleType]

    #: Whether addresses and routes that are not given are removed from an interface and the main table.
    REMOVE_UNLISTED: ClassVar[bool]

    #: Whether a neighbour entry replaces an existing one.
    REPLACE_NEIGHBOURS: ClassVar[bool]

    #: The field of an interface that says where it is attached.
    INTERFACE_PATH_FIELD: ClassVar[str]

    #: Destinations of default routes in responses, by IP version.
    DEFAULT_ROUTES: ClassVar[dict[int, str]]

    def __init__(self, hotplug_timeout: float, files: Files, cpus_came: Callable[[], object]) -> None:
        """Wait ``hotplug_timeout`` seconds for an interface that is being plugged in.

        ``cpus_came`` is called when hot-plugged CPUs are online.
        """
        self._hotplug_timeout = hotplug_timeout
        self._files = files
        self._cpus_came = cpus_came

    @cached_property
    def _network(self) -> Network:
        from caisson.agent.guest.network import Network  # here, as below: most guests have no network

        return Network(self._hotplug_timeout)

    async def UpdateInterface(self, request: kata1.UpdateInterfaceRequest | kata3.UpdateInterfaceRequest) -> Any:
        from caisson.agent.guest.network import Address, Interface

        if not request.HasField("interface"):
            raise InvalidArgument("Need network interface")
        wanted = request.interface
        addresses = tuple(Address(one.address, _prefix(one)) for one in wanted.IPAddresses)
        interface = Interface(
            name=wanted.name, mac=wanted.hwAddr, mtu=wanted.mtu, addresses=addresses, flags=wanted.raw_flags
        )
        plugged = bool(getattr(wanted, self.INTERFACE_PATH_FIELD))
        await self._network.update_interface(interface, plugged=plugged, only=self.REMOVE_UNLISTED)
        return wanted

    async def ListInterfaces(self, request: kata1.ListInterfacesRequest | kata3.ListInterfacesRequest) -> Any:
        answer = self.messages.Interfaces()
        for one in await self._network.interfaces():
            interface = answer.Interfaces.add(name=one.name, mtu=one.mtu, hwAddr=one.mac)
            for address in one.addresses:
                family = self.types.v6 if address.version == 6 else self.types.v4
                interface.IPAddresses.add(family=family, address=address.address, mask=str(address.prefix))
        return answer

    async def ListRoutes(self, request: kata1.ListRoutesRequest | kata3.ListRoutesRequest) -> Any:
        answer = self.messages.Routes()
        for one in await self._network.routes():
            destination = one.destination or self.DEFAULT_ROUTES[one.version]
            answer.Routes.add(
                dest=destination, gateway=one.gateway, device=one.device, source=one.source, scope=one.scope
            )
        return answer

    async def AddARPNeighbors(self, request: kata1.AddARPNeighborsRequest | kata3.AddARPNeighborsRequest) -> Empty:
        from caisson.agent.guest.network import Neighbour

        if not request.HasField("neighbors"):
            raise InvalidArgument("Need ARP neighbors")
        neighbours = []
        for one in request.neighbors.ARPNeighbors:
            if not one.HasField("toIPAddress"):
                raise InvalidArgument("an ARP neighbor needs toIPAddress")
            address = one.toIPAddress.address
            neighbours.append(
                Neighbour(address=address, device=one.device, mac=one.lladdr, state=one.state, flags=one.flags)
            )
        await self._network.add_neighbours(neighbours, replace=self.REPLACE_NEIGHBOURS)
        return EMPTY

    async def MemHotplugByProbe(
        self, request: kata1.MemHotplugByProbeRequest | kata3.MemHotplugByProbeRequest
    ) -> Empty:
        await asyncio.to_thread(hotplug.probe_memory, list(request.memHotplugProbeAddr))
        return EMPTY

    async def ReseedRandomDev(self, request: kata1.ReseedRandomDevRequest | kata3.ReseedRandomDevRequest) -> Empty:
        clock.reseed(request.data)
        return EMPTY

    async def SetGuestDateTime(self, request: kata1.SetGuestDateTimeRequest | kata3.SetGuestDateTimeRequest) -> Empty:
        clock.set_time(request.Sec, request.Usec)
        return EMPTY

    async def CopyFile(self, request: kata1.CopyFileRequest | kata3.CopyFileRequest) -> Empty:
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


def _prefix(address: types1.IPAddress | types3.IPAddress) -> int:
    if not (address.mask.isascii() and address.mask.isdecimal()) or int(address.mask) > 128:
        raise InvalidArgument(f'Could not parse "{address.address}/{address.mask}"')
    return int(address.mask)

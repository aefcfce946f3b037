"""The guest's side of a pod, through the agent's Kata 3.x API: its network, and what makes a clone unique."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from caisson.agent.pods import network
from caisson.agent.pods.network import Link, PodNeighbour, PodRoute
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.responses import RpcError
from caisson.proto.kata3 import agent_pb2, types_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.pods.machines import PodMachine

#: Seconds for a call that changes the guest.
CALL_TIMEOUT = 60.0

#: How often to retry a wait for a device: the agent's timeout of a few seconds is too short for an emulated guest.
MAX_WAITS = 5

#: A permanent neighbour entry, never resolved.  rtnetlink(7)
NUD_PERMANENT = 0x80

#: Bytes of entropy: twice the key of the kernel's generator.
ENTROPY_BYTES = 64


async def personalize(rpc: Any) -> None:
    """Give a guest fresh entropy and the host's time: a clone has those of its snapshot.  Raises RpcError."""
    now = time.time_ns()
    await asyncio.gather(
        rpc.ReseedRandomDev(agent_pb2.ReseedRandomDevRequest(data=os.urandom(ENTROPY_BYTES)), timeout=CALL_TIMEOUT),
        rpc.SetGuestDateTime(
            agent_pb2.SetGuestDateTimeRequest(Sec=now // 10**9, Usec=now % 10**9 // 1000), timeout=CALL_TIMEOUT
        ),
    )


async def until_plugged(method: Callable[..., Awaitable[Any]], request: Any) -> None:
    """Call a method that needs a device being plugged in.  Raises RpcError."""
    for left in reversed(range(MAX_WAITS)):
        try:
            await method(request, timeout=CALL_TIMEOUT)
            return
        except RpcError as error:
            if error.code != StatusCode.DEADLINE_EXCEEDED or not left:
                raise


class GuestNetwork:
    """A pod's network namespace on the host, connected to its VM."""

    def __init__(self, namespace: str, machine: PodMachine, rpc: Any) -> None:
        """``namespace`` is a path; ``rpc`` the agent's service (ttrpc.client.Stub)."""
        self._namespace = namespace
        self._machine = machine
        self._rpc = rpc
        self._links: list[Link] = []
        self._routes: list[PodRoute] = []

    async def connect(self) -> None:
        """Give the guest the interfaces, addresses, routes and neighbours now in the namespace.

        Raises NetworkError, MachineError or RpcError; earlier connections stay.
        """
        links = await asyncio.to_thread(network.links, self._namespace)
        if not links:
            return
        routes = await asyncio.to_thread(network.routes, self._namespace)
        neighbours = await asyncio.to_thread(network.neighbours, self._namespace)
        for link in links:
            await self._add(link)
        names = {link.name for link in links}
        await self._route([route for route in routes if route.device in names])
        await self._introduce([one for one in neighbours if one.device in names])

    @property
    def links(self) -> Sequence[Link]:
        """The guest's interfaces."""
        return self._links

    async def add_address_of_host(self, address: str) -> None:
        """Add an address in the namespace, on the host's side, that the guest reaches through its first interface.

        Raises NetworkError or RpcError.
        """
        first = self._links[0]
        await asyncio.to_thread(network.assign_host_address, self._namespace, 0, address, first)
        self._routes.append(network.PodRoute(f"{address}/32", "", first.name, "", network.SCOPE_LINK))
        await self._route([])

    async def _route(self, routes: Sequence[PodRoute]) -> None:
        """Give the guest these routes and the earlier ones: it drops all others."""
        self._routes += routes
        if routes := sorted(self._routes, key=lambda route: bool(route.gateway)):
            request = agent_pb2.UpdateRoutesRequest()
            for route in routes:
                request.routes.Routes.add(
                    dest=route.destination, gateway=route.gateway, device=route.device, source=route.source,
                    scope=route.scope, family=_family(route.destination or route.gateway), flags=route.flags,
                    mtu=route.mtu,
                )  # fmt: skip
            await self._rpc.UpdateRoutes(request, timeout=CALL_TIMEOUT)

    async def _introduce(self, neighbours: Sequence[PodNeighbour]) -> None:
        request = agent_pb2.AddARPNeighborsRequest()
        for one in neighbours:
            entry = request.neighbors.ARPNeighbors.add(device=one.device, lladdr=one.mac, state=NUD_PERMANENT)
            entry.toIPAddress.address, entry.toIPAddress.family = one.address, _family(one.address)
        if request.neighbors.ARPNeighbors:
            await self._rpc.AddARPNeighbors(request, timeout=CALL_TIMEOUT)

    async def _add(self, link: Link) -> None:
        tap = await asyncio.to_thread(network.tap, self._namespace, link, len(self._links))
        self._links.append(link)
        try:
            await asyncio.to_thread(self._machine.add_interface, tap, link.mac)
        finally:
            os.close(tap)
        request = agent_pb2.UpdateInterfaceRequest()
        request.interface.name = request.interface.device = link.name
        request.interface.hwAddr, request.interface.mtu = link.mac, link.mtu
        for address, prefix in link.addresses:
            request.interface.IPAddresses.add(address=address, mask=str(prefix), family=_family(address))
        await self._until_found(request)

    async def _until_found(self, request: agent_pb2.UpdateInterfaceRequest) -> None:
        request.interface.devicePath = request.interface.hwAddr  # the agent waits for a device being plugged in
        await until_plugged(self._rpc.UpdateInterface, request)

    def disconnect(self) -> None:
        """Restore the namespace after the VM has stopped: its tap devices are gone."""
        for link in self._links:
            network.release(self._namespace, link)
        self._links = []


def _family(address: str) -> types_pb2.IPFamily:
    return types_pb2.v6 if ":" in address else types_pb2.v4

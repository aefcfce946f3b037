"""The guest's network interfaces, routes and neighbours, configured by the host.

Every error names the failed change; if a route cannot be added, all routes are restored.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import sys
from contextlib import contextmanager

from caisson.agent.base import rtnetlink as rt
from caisson.agent.base.errors import DeviceNotFound, DeviceTimeout, InvalidArgument, LinkNotFound, SystemCallFailed
from caisson.agent.base.rtnetlink import Message, Rtnetlink
from caisson.agent.guest import modules
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from ipaddress import IPv4Address, IPv6Address

IFF_UP, IFF_NOARP = 0x1, 0x80  # netdevice(7)
IFA_F_NODAD = 0x02  # the address is ours: no duplicate address detection
RTM_F_CLONED = 0x200
RT_TABLE_MAIN, RTPROT_KERNEL, RTPROT_BOOT, RTN_UNICAST = 254, 2, 3, 1  # rtnetlink(7)
NUD_PERMANENT = 0x80
#: Hosts' notations for the destination of a default route.
DEFAULT_ROUTES = ("", "default", "0.0.0.0", "::")
NAME_MAX = 15  # IFNAMSIZ, less the NUL
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


class Address(Record):
    """An address with the length of its network's prefix."""

    address: str
    prefix: int

    @property
    def version(self) -> int:
        """4 or 6."""
        return 6 if ":" in self.address else 4


class Interface(Record):
    """A network interface; `mtu` in bytes, `flags` of netdevice(7)."""

    name: str
    mac: str
    mtu: int
    addresses: tuple[Address, ...] = ()
    flags: int = 0


class Route(Record):
    """A route of the main table; an empty `destination` is the default route, an empty `gateway` a direct one.

    `version` of IP is 0 if the addresses imply it; `flags` are RTNH_F_ of rtnetlink(7), `mtu` in bytes, 0 for none.
    """

    destination: str
    gateway: str
    device: str
    source: str = ""
    scope: int = 0
    version: int = 0
    flags: int = 0
    mtu: int = 0


class Neighbour(Record):
    """A neighbour on a link; `state` and `flags` as in rtnetlink(7), NUD_ and NTF_."""

    address: str
    device: str
    mac: str
    state: int = 0
    flags: int = 0


class _RouteRequest(Record):
    """A route as an rtnetlink request."""

    fixed: bytes
    attributes: dict[int, bytes]
    what: str


class Network:
    """Apply the host's network configuration.  One change at a time: each consists of several steps.

    The kernel may delay its replies while it is busy with a device, so everything runs in threads.
    """

    def __init__(self, hotplug_seconds: float = 3.0) -> None:
        self._hotplug_seconds = hotplug_seconds
        self._lock = asyncio.Lock()

    async def interfaces(self) -> list[Interface]:
        """List all interfaces, lo included."""
        return await asyncio.to_thread(_interfaces)

    async def routes(self) -> list[Route]:
        """List the routes of the main table, v4 and v6."""
        return await asyncio.to_thread(_routes)

    async def update_interface(self, wanted: Interface, *, plugged: bool = False, only: bool = True) -> None:
        """Give the interface with this MAC its name, MTU and addresses, and bring it up.

        `plugged`: wait for it if it is still being plugged in.  `only`: remove all other addresses.  Raises
        InvalidArgument, LinkNotFound, SystemCallFailed or DeviceTimeout.
        """
        if not wanted.mac:
            raise InvalidArgument("Interface HwAddr empty")
        if not 0 < len(wanted.name) <= NAME_MAX or "/" in wanted.name or wanted.name.split() != [wanted.name]:
            raise InvalidArgument(
                f"{wanted.name!r} is not a valid interface name: 1 to {NAME_MAX} bytes without spaces and slashes"
            )
        if wanted.mtu >= 1 << 32:
            raise SystemCallFailed(f"Could not set MTU {wanted.mtu}: {os.strerror(errno.EINVAL).lower()}")
        async with self._lock:
            if plugged:
                await self._wait_for(wanted.mac)
            elif not await asyncio.to_thread(_is_present, wanted.mac):
                await asyncio.to_thread(_find_interfaces)  # other hosts retry the call
            await asyncio.to_thread(_update_interface, wanted, only)

    async def _wait_for(self, mac: str) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._hotplug_seconds
        await asyncio.to_thread(_find_interfaces)
        while not await asyncio.to_thread(_is_present, mac):
            if loop.time() >= deadline:
                raise DeviceTimeout(device=mac, seconds=self._hotplug_seconds)
            await asyncio.sleep(0.05)

    async def update_routes(self, wanted: Sequence[Route], *, only: bool = True) -> None:
        """Install these routes; with `only`, remove all others except the kernel's own and those of lo.

        Direct routes come first: gateways are reached through them.  On SystemCallFailed the old routes are restored.
        """
        async with self._lock:
            await asyncio.to_thread(_update_routes, sorted(wanted, key=lambda route: bool(route.gateway)), only)

    async def add_neighbours(self, neighbours: Sequence[Neighbour], *, replace: bool = False) -> None:
        """Add entries to the neighbour tables.  Raises SystemCallFailed, also for an existing entry without
        `replace`.
        """
        async with self._lock:
            await asyncio.to_thread(_add_neighbours, neighbours, rt.REPLACE if replace else rt.EXCL)


def _find_interfaces() -> None:
    """Make the kernel scan for hot-plugged devices.  Raises FailedPrecondition if the driver cannot be loaded."""
    modules.load_available(("virtio_net",))
    _rescan_pci()


def _interfaces() -> list[Interface]:
    with Rtnetlink() as netlink:
        addresses: dict[int, list[Address]] = {}
        for message in netlink.dump(rt.GETADDR):
            family, prefix, _, _, index = message.fixed
            value = message.attributes.get(rt.IFA_LOCAL) or message.attributes.get(rt.IFA_ADDRESS)
            if value and family in FAMILIES.values():
                addresses.setdefault(index, []).append(Address(socket.inet_ntop(family, value), prefix))
        return [
            Interface(
                name=link.text(rt.IFLA_IFNAME),
                mac=_mac_of(link),
                mtu=link.number(rt.IFLA_MTU),
                addresses=tuple(addresses.get(link.fixed[2], ())),
                flags=link.fixed[3],
            )
            for link in netlink.dump(rt.GETLINK)
        ]


def _mac_of(link: Message) -> str:
    return link.attributes.get(rt.IFLA_ADDRESS, b"").hex(":")


def _is_present(mac: str) -> bool:
    with Rtnetlink() as netlink:
        return any(_mac_of(link) == mac.lower() for link in netlink.dump(rt.GETLINK))


def _update_interface(wanted: Interface, only: bool) -> None:
    addresses = [(_ip_address(one.address), one.prefix) for one in wanted.addresses]
    with Rtnetlink() as netlink:
        link = next((link for link in netlink.dump(rt.GETLINK) if _mac_of(link) == wanted.mac.lower()), None)
        if link is None:
            raise LinkNotFound(address=wanted.mac)
        index = link.fixed[2]

        def change(what: str, attributes: dict[int, bytes], flags: int = 0, mask: int = 0) -> None:
            with _explain_errors(what):
                netlink.change(rt.NEWLINK, rt.LINK.pack(0, 0, index, flags, mask), attributes)

        change(f"Could not bring down interface {wanted.name}", {}, 0, IFF_UP)
        try:
            with _explain_errors(f"Could not remove the addresses of {wanted.name}"):
                for message in netlink.dump(rt.GETADDR):
                    if only and message.fixed[4] == index:
                        netlink.change(rt.DELADDR, rt.ADDRESS.pack(*message.fixed), message.attributes)
            for address, prefix in addresses:
                with _explain_errors(f"Could not add {address}/{prefix} to interface {wanted.name}"):
                    family, flags = FAMILIES[address.version], IFA_F_NODAD if address.version == 6 else 0
                    value = {
                        rt.IFA_LOCAL: address.packed,
                        rt.IFA_ADDRESS: address.packed,
                        rt.IFA_FLAGS: rt.number(flags),
                    }
                    fixed = rt.ADDRESS.pack(family, min(prefix, 255), 0, 0, index)
                    netlink.change(rt.NEWADDR, fixed, value, rt.CREATE | (rt.EXCL if only else rt.REPLACE))
            if link.text(rt.IFLA_IFNAME) != wanted.name:
                change(f"Could not set name {wanted.name}", {rt.IFLA_IFNAME: wanted.name.encode() + b"\0"})
            change(f"Could not set MTU {wanted.mtu}", {rt.IFLA_MTU: rt.number(wanted.mtu)})
            if wanted.flags & IFF_NOARP:
                change(f"Could not set NOARP on {wanted.name}", {}, IFF_NOARP, IFF_NOARP)
        finally:
            change(f"Could not bring up interface {wanted.name}", {}, IFF_UP, IFF_UP)


def _names(netlink: Rtnetlink) -> dict[int, str]:
    return {link.fixed[2]: link.text(rt.IFLA_IFNAME) for link in netlink.dump(rt.GETLINK)}


def _main_table(netlink: Rtnetlink) -> Iterator[Message]:
    for family in FAMILIES.values():
        for message in netlink.dump(rt.GETROUTE, family):
            if message.number(rt.RTA_TABLE) == RT_TABLE_MAIN and not message.fixed[8] & RTM_F_CLONED:
                yield message


def _routes() -> list[Route]:
    with Rtnetlink() as netlink:
        names = _names(netlink)
        return [_route_of(message, names) for message in _main_table(netlink)]


def _route_of(message: Message, names: dict[int, str]) -> Route:
    family, length, scope = message.fixed[0], message.fixed[1], message.fixed[6]

    def address(attribute: int) -> str:
        value = message.attributes.get(attribute)
        return socket.inet_ntop(family, value) if value else ""

    destination = address(rt.RTA_DST)
    return Route(
        destination=f"{destination}/{length}" if destination else "",
        gateway=address(rt.RTA_GATEWAY),
        device=names.get(message.number(rt.RTA_OIF), ""),
        source=address(rt.RTA_PREFSRC),
        scope=scope,
        version=6 if family == socket.AF_INET6 else 4,
        mtu=_mtu(message.attributes.get(rt.RTA_METRICS, b"")),
    )


def _mtu(metrics: bytes) -> int:
    """Return the MTU among a route's metrics, which are attributes of 32-bit numbers; 0 where there is none."""
    for at in range(0, len(metrics) - 7, 8):
        if int.from_bytes(metrics[at + 2 : at + 4], sys.byteorder) == rt.RTAX_MTU:
            return int.from_bytes(metrics[at + 4 : at + 8], sys.byteorder)
    return 0


def _update_routes(wanted: Sequence[Route], only: bool) -> None:
    with Rtnetlink() as netlink:
        names = _names(netlink)
        indexes = {name: index for index, name in names.items()}
        requests = [_request_of(route, indexes) for route in wanted]
        old = [
            _request_from_dump(message, names)
            for message in _main_table(netlink)
            if only and message.fixed[5] != RTPROT_KERNEL and names.get(message.number(rt.RTA_OIF)) != "lo"
        ]
        undo: list[tuple[int, _RouteRequest, int]] = []
        try:
            for request in old:
                with _explain_errors(f"Could not delete {request.what}"):
                    netlink.change(rt.DELROUTE, request.fixed, request.attributes)
                undo.append((rt.NEWROUTE, request, rt.CREATE))
            for request in requests:
                with _explain_errors(f"Could not add/replace {request.what}"):
                    if _add_or_replace_route(netlink, request):
                        undo.append((rt.DELROUTE, request, 0))
        except SystemCallFailed:
            for kind, request, flags in reversed(undo):
                try:
                    netlink.change(kind, request.fixed, request.attributes, flags)
                except OSError:  # removed together with another
                    continue
            raise


def _add_or_replace_route(netlink: Rtnetlink, request: _RouteRequest) -> bool:
    """Add a route, replacing one to the same destination.  Returns whether there was none."""
    try:
        netlink.change(rt.NEWROUTE, request.fixed, request.attributes, rt.CREATE | rt.EXCL)
    except FileExistsError:
        netlink.change(rt.NEWROUTE, request.fixed, request.attributes, rt.CREATE | rt.REPLACE)
        return False
    return True


def _request_from_dump(message: Message, names: dict[int, str]) -> _RouteRequest:
    """Return the request that adds, or deletes, a route of a dump."""
    attributes = {kind: value for kind, value in message.attributes.items() if kind != rt.RTA_CACHEINFO}
    what = f"the route {_route_of(message, names)}"
    return _RouteRequest(fixed=rt.ROUTE.pack(*message.fixed), attributes=attributes, what=what)


def _request_of(route: Route, indexes: dict[str, int]) -> _RouteRequest:
    """Encode a route as rtnetlink's request.  Raises DeviceNotFound or SystemCallFailed."""
    from ipaddress import ip_network

    what = f"route dest({route.destination})/gw({route.gateway})/dev({route.device})"
    if route.device not in indexes:
        raise DeviceNotFound(device=route.device)
    attributes = {rt.RTA_OIF: rt.number(indexes[route.device])}
    length, versions = 0, set()
    if route.destination not in DEFAULT_ROUTES:
        try:
            network = ip_network(route.destination, strict=False)
        except ValueError:
            raise SystemCallFailed(f"Could not parse route destination {route.destination}") from None
        attributes[rt.RTA_DST], length = network.network_address.packed, network.prefixlen
        versions.add(network.version)
    for attribute, text in ((rt.RTA_GATEWAY, route.gateway), (rt.RTA_PREFSRC, route.source)):
        if text:
            address = _ip_address(text)
            attributes[attribute] = address.packed
            versions.add(address.version)
    if route.mtu:
        head = struct.pack("=HH", 8, rt.RTAX_MTU)
        attributes[rt.RTA_METRICS] = head + rt.number(route.mtu)
    if len(versions) > 1:
        raise SystemCallFailed(f"Could not add/replace {what}: IPv4 and IPv6 in one")
    if not 0 <= route.scope <= 255:
        raise SystemCallFailed(f"Could not add/replace {what}: scope {route.scope} is not between 0 and 255")
    # A default route without any address, through a device alone, is ipvlan's.
    family = FAMILIES[versions.pop() if versions else route.version or 4]
    fixed = rt.ROUTE.pack(family, length, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, route.scope, RTN_UNICAST, route.flags)
    return _RouteRequest(fixed=fixed, attributes=attributes, what=what)


def _add_neighbours(neighbours: Sequence[Neighbour], flag: int) -> None:
    with Rtnetlink() as netlink:
        indexes = {name: index for index, name in _names(netlink).items()}
        for one in neighbours:
            if one.device not in indexes:
                raise DeviceNotFound(device=one.device)
            address = _ip_address(one.address)
            with _explain_errors(f"Could not add ARP neighbor {one.address} on {one.device}"):
                mac = _mac(one.mac)
                state, flags = (one.state or NUD_PERMANENT) & 0xFFFF, one.flags & 0xFF
                fixed = rt.NEIGHBOUR.pack(FAMILIES[address.version], indexes[one.device], state, flags, 0)
                attributes = {rt.NDA_DST: address.packed, rt.NDA_LLADDR: mac}
                netlink.change(rt.NEWNEIGH, fixed, attributes, rt.CREATE | flag)


@contextmanager
def _explain_errors(what: str) -> Iterator[None]:
    """Turn the kernel's error into SystemCallFailed, naming the attempted change."""
    try:
        yield
    except OSError as error:
        raise SystemCallFailed(f"{what}: {os.strerror(error.errno or 0).lower()}") from error


def _ip_address(text: str) -> IPv4Address | IPv6Address:
    from ipaddress import ip_address

    try:
        return ip_address(text)
    except ValueError:
        raise SystemCallFailed(f'Could not parse "{text}"') from None


def _mac(text: str) -> bytes:
    try:
        return bytes(int(part, 16) for part in text.split(":"))
    except ValueError:
        raise OSError(errno.EINVAL, text) from None


def _rescan_pci() -> None:
    """Make the kernel rescan the PCI bus (sysfs-bus-pci), if there is one."""
    try:
        with open("/sys/bus/pci/rescan", "w") as file:  # noqa: PTH123 - a sysfs file
            file.write("1")
    except OSError:
        pass

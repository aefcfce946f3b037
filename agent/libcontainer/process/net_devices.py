"""Move network devices into a container's network namespace: `linux.netDevices`.

The runtime, in whose namespace a device is, moves it once the container's exists.  The kernel drops its addresses;
requests that nsexec makes inside (the plan's NETLINK steps) restore them.  Sources: OCI runtime specification,
config-linux.md, "Network Devices"; rtnetlink(7).
"""

from __future__ import annotations

from struct import pack

from caisson.agent.base import rtnetlink as rt
from caisson.agent.libcontainer.errors import LaunchError, reason
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

IFF_UP = 0x1
IFA_F_PERMANENT = 0x80
RT_SCOPE_UNIVERSE = 0
ENODEV = 19
#: Attributes of an address to keep; its label would contain the old device name.
KEPT_ATTRIBUTES = (rt.IFA_ADDRESS, rt.IFA_LOCAL, rt.IFA_BROADCAST, rt.IFA_FLAGS)


class NetDevice(Record):
    """A device by its index here; `requests` are made inside, once it is known there as `name`."""

    source: str
    name: str
    index: int
    requests: tuple[bytes, ...]


def find(names: Mapping[str, str]) -> tuple[NetDevice, ...]:
    """Find devices and their addresses by `linux.netDevices`, names here and inside.  Raises LaunchError."""
    with rt.Rtnetlink() as netlink:
        links = {link.text(rt.IFLA_IFNAME): link.fixed[2] for link in netlink.dump(rt.GETLINK)}
        addresses = netlink.dump(rt.GETADDR)
    found = []
    for source, name in names.items():
        if source not in links:
            raise _error(source, OSError(ENODEV, ""))
        own = [_new_address(one) for one in addresses if one.fixed[4] == links[source] and _is_kept(one)]
        found.append(NetDevice(source, name, links[source], (*own, _request(rt.NEWLINK, _up()))))
    return tuple(found)


def move(devices: Iterable[NetDevice], pid: int) -> None:
    """Move devices into the network namespace of a process, under their names there.  Raises LaunchError."""
    with rt.Rtnetlink() as netlink:
        for device in devices:
            link = rt.LINK.pack(0, 0, device.index, 0, 0)
            try:
                netlink.change(
                    rt.NEWLINK,
                    link,
                    {rt.IFLA_NET_NS_PID: rt.number(pid), rt.IFLA_IFNAME: device.name.encode() + b"\0"},
                )
            except OSError as error:
                raise _error(device.source, error) from error


def _is_kept(address: rt.Message) -> bool:
    """Return whether an address is global, and neither leased nor configured by the kernel."""
    flags = address.number(rt.IFA_FLAGS) or address.fixed[2]
    return address.fixed[3] == RT_SCOPE_UNIVERSE and bool(flags & IFA_F_PERMANENT)


def _new_address(address: rt.Message) -> bytes:
    family, prefix, flags, scope, _ = address.fixed
    kept = {kind: address.attributes[kind] for kind in KEPT_ATTRIBUTES if kind in address.attributes}
    fixed = rt.ADDRESS.pack(family, prefix, flags, scope, 0)
    return _request(rt.NEWADDR, fixed + rt.encode_attributes(kept), rt.CREATE | rt.EXCL)


def _up() -> bytes:
    return rt.LINK.pack(0, 0, 0, IFF_UP, IFF_UP)


def _request(kind: int, body: bytes, flags: int = 0) -> bytes:
    return pack("=IHHII", 16 + len(body), kind, rt.REQUEST | rt.ACK | flags, 1, 0) + body


def _error(name: str, error: OSError) -> LaunchError:
    words = reason(error.errno or 0)
    return LaunchError(f"network device {name}: {words}", step="network device", path=name, errno=error.errno or 0)

"""A pod's network namespace on the host, connected to its VM: each interface's packets go to a tap device and back.

The guest gets what CNI or docker put into the namespace (addresses, routes, MTU); on the host's side the interface
keeps its name and its counters, and tc redirects incoming packets.  Source: tc-mirred(8); veth(4); tun(4).
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caisson.agent.base import syscalls
from caisson.proto.record import Record

#: ioctl(2) of /dev/net/tun.  include/uapi/linux/if_tun.h
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000

#: Scopes of routes.  rtnetlink(7)
SCOPE_LINK, SCOPE_HOST = 253, 254

#: ip(8)'s options for the families, and the destination of a default route in each.
DEFAULT = {"-4": "", "-6": "::"}

#: The gateway is on the link, whatever the addresses say.  rtnetlink(7)
RTNH_F_ONLINK = 4

#: Seconds for one command of iproute2.
COMMAND_TIMEOUT = 20.0


class NetworkError(Exception):
    """The namespace could not be read or connected; the text is one line."""


class Link(Record):
    """An interface of the pod: ``addresses`` as (address, prefix length)."""

    name: str
    mac: str
    mtu: int
    addresses: tuple[tuple[str, int], ...]


class PodRoute(Record):
    """A route of the pod; a ``destination`` of "" or "::" is the default route, an empty ``gateway`` a direct one.

    ``flags`` are RTNH_F_ of rtnetlink(7), ``mtu`` in bytes, 0 for the link's.
    """

    destination: str
    gateway: str
    device: str
    source: str
    scope: int
    flags: int = 0
    mtu: int = 0


class PodNeighbour(Record):
    """A permanent neighbour on a link, set by CNI."""

    address: str
    mac: str
    device: str


def links(namespace: str) -> list[Link]:
    """Return the interfaces of a namespace except lo.

    Raises NetworkError, also for this process's own namespace: its interfaces are the host's, and must not be taken.
    """
    try:
        is_ours = Path(namespace).samefile("/proc/self/ns/net")
    except OSError as error:
        raise NetworkError(f"network namespace {namespace}: {error.strerror}") from error
    if is_ours:
        raise NetworkError(f"network namespace {namespace}: is the host's; a pod needs one of its own")
    found = []
    for one in _json(namespace, "addr", "show"):
        if "LOOPBACK" in one.get("flags", ()) or one.get("link_type") != "ether":
            continue
        addresses = tuple(
            (address["local"], address["prefixlen"])
            for address in one.get("addr_info", ())
            if address.get("scope") != "link"
        )
        found.append(Link(one["ifname"], one["address"], one["mtu"], addresses))
    return found


def routes(namespace: str) -> list[PodRoute]:
    """Return the routes of a namespace's main table, direct ones first.  Raises NetworkError.

    Blackhole and unreachable routes are left out; of several next hops, the first is used.
    """
    found = []
    for family in DEFAULT:
        for listed in _json(namespace, family, "route", "show"):
            one = {**listed, **next(iter(listed.get("nexthops") or ()), {})}
            destination = one.get("dst", "")
            if one.get("protocol") == "kernel" and not one.get("gateway"):
                continue  # comes with the address
            if destination.startswith("fe80:") or one.get("dev", "lo") == "lo":
                continue
            scope = {"link": SCOPE_LINK, "host": SCOPE_HOST}.get(str(one.get("scope", "")), 0)
            flags = RTNH_F_ONLINK if "onlink" in (one.get("flags") or ()) else 0
            mtu = next((int(metric["mtu"]) for metric in one.get("metrics") or () if "mtu" in metric), 0)
            found.append(
                PodRoute(
                    DEFAULT[family] if destination == "default" else destination,
                    one.get("gateway") or (one.get("via") or {}).get("host", ""), one["dev"], one.get("prefsrc", ""),
                    scope, flags, mtu,
                )
            )  # fmt: skip
    return sorted(found, key=lambda route: bool(route.gateway))


def neighbours(namespace: str) -> list[PodNeighbour]:
    """Return the permanent neighbours of a namespace's interfaces.  Raises NetworkError."""
    return [
        PodNeighbour(one["dst"], one["lladdr"], one["dev"])
        for one in _json(namespace, "neigh", "show", "nud", "permanent")
        if one.get("lladdr")
    ]


def tap(namespace: str, link: Link, number: int) -> int:
    """Create a tap device in a namespace, connected to one of its interfaces; returns its descriptor, which keeps it
    alive.

    Raises NetworkError.
    """
    name = f"caisson{number}"
    fd: int = inside(namespace, lambda: _open_tap(name))
    try:
        run(namespace, "ip", "link", "set", name, "mtu", str(link.mtu), "up")
        for source, target in ((link.name, name), (name, link.name)):
            run(namespace, "tc", "qdisc", "add", "dev", source, "ingress")
            run(
                namespace, "tc", "filter", "add", "dev", source, "parent", "ffff:", "protocol", "all",
                "u32", "match", "u8", "0", "0", "action", "mirred", "egress", "redirect", "dev", target,
            )  # fmt: skip
        run(namespace, "ip", "link", "set", link.name, "up")
    except BaseException:
        os.close(fd)
        raise
    return fd


def release(namespace: str, link: Link) -> None:
    """Stop redirecting an interface's packets; does nothing if it, or the namespace, is gone."""
    try:
        run(namespace, "tc", "qdisc", "del", "dev", link.name, "ingress")
    except NetworkError:
        pass


def assign_host_address(namespace: str, number: int, address: str, link: Link) -> None:
    """Give a tap device an address on the host's side, reachable from the guest.  Raises NetworkError."""
    name = f"caisson{number}"
    matches = {
        "ip": ("match", "ip", "dst", f"{address}/32"),
        "arp": ("match", "u32", f"0x{socket.inet_aton(address).hex()}", "0xffffffff", "at", "24"),  # the target's
    }
    run(namespace, "ip", "-4", "addr", "flush", "dev", link.name)  # the guest's: here they would be this host's own
    run(namespace, "ip", "addr", "add", f"{address}/32", "dev", name)
    for priority, (protocol, match) in enumerate(matches.items(), 1):
        run(
            namespace, "tc", "filter", "add", "dev", name, "parent", "ffff:", "protocol", protocol,
            "prio", str(priority), "u32", *match, "flowid", ":1",  # without an action: it stays here
        )  # fmt: skip
    for guest, _ in link.addresses:
        if ":" not in guest:
            run(namespace, "ip", "route", "add", f"{guest}/32", "dev", name, "src", address)


def _open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    except OSError:
        os.close(fd)
        raise
    return fd


def inside(namespace: str, work: Any) -> Any:
    """Run a function in a network namespace, in its own thread.  Raises NetworkError."""
    syscalls.preload()
    result: list[Any] = []
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                syscalls.setns(fd, syscalls.CLONE_NEWNET)
            finally:
                os.close(fd)
            result.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if failures:
        raise NetworkError(f"network namespace {namespace}: {failures[0]}") from failures[0]
    return result[0]


def _json(namespace: str, *words: str) -> list[dict[str, Any]]:
    return list(json.loads(run(namespace, "ip", "-json", *words) or b"[]"))


def run(namespace: str, *words: str) -> bytes:
    """Run a command in a network namespace; returns its output.  Raises NetworkError."""
    command: Sequence[str] = ("nsenter", f"--net={namespace}", *words)
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetworkError(f"{' '.join(words)}: {error}") from error
    if done.returncode != 0:
        raise NetworkError(f"{' '.join(words)}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout

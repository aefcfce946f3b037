"""A guest's network without root: QEMU's user-mode network (slirp), and published ports of this machine.

QEMU translates the guest's traffic to its own sockets, so the guest can reach whatever this user can.  There is no DHCP
in the guest: the addresses are always the same, and its starter configures them through the agent (UpdateInterface,
UpdateRoutes).  Source: QEMU, docs/system/devices/net.rst, "Using the user mode network stack".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from caisson.image.vm.errors import InvalidOption
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

KINDS = ("none", "user")

#: The interface's name in the guest, its MAC address (locally administered), and slirp's addresses.
INTERFACE = "eth0"
MAC = "52:54:00:ca:15:50"
ADDRESS, PREFIX, GATEWAY, DNS, MTU = "10.0.2.15", 24, "10.0.2.2", "10.0.2.3", 1500

#: [ADDRESS:]PORT:PORT[/udp], this machine's port first.
RULE = re.compile(r"(?:(?P<address>[0-9.]+|localhost):)?(?P<host>\d+):(?P<guest>\d+)(?:/(?P<protocol>tcp|udp))?")

#: Listening on ports below needs a capability.
FIRST_UNPRIVILEGED = 1024


class Publish(Record):
    """A published port: one of this machine, forwarded to one of the guest."""

    host: int
    guest: int
    address: str = "127.0.0.1"
    protocol: str = "tcp"

    @classmethod
    def parse(cls, text: str) -> Publish:
        """Parse [ADDRESS:]PORT:PORT[/udp].  Raises InvalidOption."""
        found = RULE.fullmatch(text)
        if not found or not all(0 < int(found[side]) < 65536 for side in ("host", "guest")):
            raise InvalidOption(f"--publish {text}: is not [ADDRESS:]PORT:PORT[/udp]; for example 8080:80")
        address = found["address"] or cls.address
        if address == "localhost":
            address = cls.address
        return cls(int(found["host"]), int(found["guest"]), address, found["protocol"] or cls.protocol)

    @property
    def hostfwd(self) -> str:
        """Return the rule as QEMU's hostfwd."""
        return f"hostfwd={self.protocol}:{self.address}:{self.host}-:{self.guest}"

    def __str__(self) -> str:
        return f"{self.address}:{self.host} → {self.protocol} port {self.guest}"


def options(publish: Sequence[Publish]) -> list[str]:
    """Return QEMU's options for a user-mode network."""
    rules = "".join(f",{rule.hostfwd}" for rule in publish)
    net = f"{GATEWAY.rpartition('.')[0]}.0/{PREFIX}"
    return [
        "-netdev", f"user,id=net,ipv6=off,net={net},host={GATEWAY},dns={DNS}{rules}",
        "-device", f"virtio-net-pci,netdev=net,mac={MAC},romfile=",
    ]  # fmt: skip


def document(kind: str, publish: Sequence[Publish]) -> dict[str, Any]:
    """Return the network's entry in vm.json, from which the guest's side is configured."""
    if kind == "none":
        return {"kind": kind}
    return {
        "kind": kind,
        "interface": INTERFACE,
        "mac": MAC,
        "address": ADDRESS,
        "prefix": PREFIX,
        "gateway": GATEWAY,
        "dns": [DNS],
        "mtu": MTU,
        "published": [str(rule) for rule in publish],
    }

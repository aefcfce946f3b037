"""Test a pod's network namespace as set up by CNI, passed to an agent: both families, off-link gateways, neighbours."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.pods.guest import GuestNetwork
from caisson.agent.pods.holder import Holder
from caisson.agent.rpc.ttrpc.client import Client, Stub
from caisson.proto.kata3 import agent_pb2
from tests.native.agent_support import RunningAgent

pytestmark = pytest.mark.root
MAC = "02:00:00:00:00:0a"
GATEWAY_MAC = "02:00:00:00:00:01"

CNI = f"""
link add eth0 address {MAC} mtu 1400 type veth peer name far
link set far netns OUTSIDE up
link set eth0 up
addr add 10.88.0.5/24 dev eth0
addr add fd00:88::5/64 dev eth0 nodad
route add 169.254.1.1 dev eth0 scope link
route add default via 169.254.1.1 dev eth0
route add 10.99.0.0/16 via 192.0.2.9 dev eth0 onlink mtu 1300
route add blackhole 10.98.0.0/16
-6 route add default via fe80::1 dev eth0
-6 route add fd00:99::/64 via fd00:88::1 dev eth0
neigh add 169.254.1.1 lladdr {GATEWAY_MAC} dev eth0 nud permanent
neigh add fe80::1 lladdr {GATEWAY_MAC} dev eth0 nud permanent
"""


class PluggedMachine:
    """A machine that already has the interface: a tap device of the pod's that leads nowhere."""

    def add_interface(self, tap: int, mac: str) -> None:
        assert mac == MAC


@pytest.fixture
def pod() -> Iterator[Holder]:
    holder, outside = Holder(), Holder()
    for each in (holder, outside):
        each.open()
    for line in CNI.replace("OUTSIDE", str(outside.pid)).strip().splitlines():
        ip(holder.namespace, *line.split())
    yield holder
    holder.close()
    outside.close()


@pytest.fixture
def guest(tmp_path: Path, nsexec_path: Path, busybox_rootfs: Path) -> Iterator[RunningAgent]:
    running = RunningAgent(tmp_path, nsexec_path, busybox_rootfs, within=("unshare", "--net"))
    ip(namespace_of(running), "link", "add", "plugged", "address", MAC, "type", "veth", "peer", "name", "other")
    ip(namespace_of(running), "link", "set", "other", "up")
    yield running
    running.stop()


def namespace_of(agent: RunningAgent) -> str:
    return f"/proc/{agent.pid}/ns/net"


def ip(namespace: str, *words: str) -> Any:
    command = ["nsenter", f"--net={namespace}", "ip", "-json", *words]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out) if out.strip() else []


async def test_a_guest_has_the_addresses_routes_and_neighbours_of_its_pod(pod: Holder, guest: RunningAgent) -> None:
    client = await Client.connect(guest.socket)
    try:
        rpc = Stub(client, agent_pb2.DESCRIPTOR.services_by_name["AgentService"])
        await GuestNetwork(pod.namespace, PluggedMachine(), rpc).connect()  # type: ignore[arg-type]
    finally:
        await client.close()
    where = namespace_of(guest)
    (link,) = ip(where, "addr", "show", "eth0")
    addresses = {(one["local"], one["prefixlen"]) for one in link["addr_info"] if one["scope"] == "global"}
    assert (link["mtu"], addresses) == (1400, {("10.88.0.5", 24), ("fd00:88::5", 64)})
    assert [one["gateway"] for one in ip(where, "-4", "route", "show", "default")] == ["169.254.1.1"]
    assert [one["gateway"] for one in ip(where, "-6", "route", "show", "default")] == ["fe80::1"]
    (odd,) = ip(where, "route", "show", "10.99.0.0/16")
    assert (odd["gateway"], odd["flags"], odd["metrics"]) == ("192.0.2.9", ["onlink"], [{"mtu": 1300}])
    assert [one["gateway"] for one in ip(where, "-6", "route", "show", "fd00:99::/64")] == ["fd00:88::1"]
    neighbours = {(one["dst"], one["lladdr"]) for one in ip(where, "neigh", "show", "nud", "permanent")}
    assert neighbours == {("169.254.1.1", GATEWAY_MAC), ("fe80::1", GATEWAY_MAC)}

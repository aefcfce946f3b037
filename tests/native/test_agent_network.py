"""Test interfaces, routes and neighbours, in the agent's own network namespace."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.client import Agent
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.kata1 import agent_pb2, types_pb2
from tests.native.agent_support import RunningAgent, refused

pytestmark = pytest.mark.root
MAC = "02:00:00:00:00:0a"


@pytest.fixture
def isolated_agent(tmp_path: Path, nsexec_path: Path, busybox_rootfs: Path) -> Iterator[RunningAgent]:
    """Start an agent in a network namespace with a pair of interfaces, one of which has the MAC address."""
    running = RunningAgent(tmp_path, nsexec_path, busybox_rootfs, within=("unshare", "--net"))
    ip(running, "link", "add", "plugged", "address", MAC, "type", "veth", "peer", "name", "other")
    ip(running, "link", "set", "other", "up")
    yield running
    running.stop()
    assert "a bug in a handler" not in running.log.read_text()


def ip(agent: RunningAgent, *words: str) -> Any:
    """Return the output of ip(8) in the agent's namespace."""
    command = ["nsenter", f"--net=/proc/{agent.process.pid}/ns/net", "ip", "-json", *words]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out) if out.strip() else []


def wanted(name: str = "eth7", mac: str = MAC, **fields: Any) -> Any:
    addresses = fields.pop("addresses", ["192.0.2.10/24"])
    pairs = [address.split("/") for address in addresses]
    return agent_pb2.UpdateInterfaceRequest(
        interface=types_pb2.Interface(
            name=name,
            hwAddr=mac,
            mtu=fields.pop("mtu", 1400),
            IPAddresses=[
                types_pb2.IPAddress(address=address, mask=mask, family=types_pb2.v6 if ":" in address else types_pb2.v4)
                for address, mask in pairs
            ],
            **fields,
        )
    )


def routes(*given: dict[str, Any]) -> Any:
    return agent_pb2.UpdateRoutesRequest(
        routes=agent_pb2.Routes(Routes=[types_pb2.Route(**{"device": "eth7", **one}) for one in given])
    )


async def table(client: Agent, device: str = "eth7") -> set[tuple[str, str]]:
    """Return a device's routes, except those the kernel created for its addresses."""
    listed = (await client.rpc.ListRoutes(agent_pb2.ListRoutesRequest())).Routes
    return {(one.dest, one.gateway) for one in listed if one.device == device and not one.dest.startswith("fe80::")}


async def test_an_interface_gets_its_name_and_addresses(isolated_agent: RunningAgent) -> None:
    async with isolated_agent.connect() as client:
        request = wanted(addresses=["192.0.2.10/24", "2001:db8::10/64"], raw_flags=0x80)
        assert await client.rpc.UpdateInterface(request) == request.interface
        (link,) = ip(isolated_agent, "addr", "show", "dev", "eth7")
        assert (link["mtu"], link["operstate"], link["address"]) == (1400, "UP", MAC)
        assert {"UP", "NOARP"} <= set(link["flags"])
        found = {(one["local"], one["prefixlen"]) for one in link["addr_info"] if one["scope"] == "global"}
        assert found == {("192.0.2.10", 24), ("2001:db8::10", 64)}
        assert not any("tentative" in one for one in link["addr_info"] if one["scope"] == "global")

        await client.rpc.UpdateInterface(wanted("eth8", addresses=["198.51.100.1/32"], mtu=1500))
        interfaces = (await client.rpc.ListInterfaces(agent_pb2.ListInterfacesRequest())).Interfaces
        by_name = {one.name: one for one in interfaces}
        assert set(by_name) == {"lo", "eth8", "other"}
        assert by_name["eth8"].mtu == 1500 and by_name["eth8"].hwAddr == MAC
        listed = {(a.address, a.mask, a.family) for a in by_name["eth8"].IPAddresses}
        assert ("198.51.100.1", "32", types_pb2.v4) in listed and len(listed) <= 2  # and a link-local one


@pytest.mark.parametrize(
    "request_, code, text",
    [
        (agent_pb2.UpdateInterfaceRequest(), Code.INVALID_ARGUMENT, "Need network interface"),
        (wanted(mac=""), Code.INVALID_ARGUMENT, "Interface HwAddr empty"),
        (
            wanted(mac="02:00:00:00:00:99"),
            Code.INTERNAL,
            "updateInterface: rpc error: code = NotFound desc = "
            'Could not find the link corresponding to HwAddr "02:00:00:00:00:99"',
        ),
        (wanted(addresses=["192.0.2/24"]), Code.INTERNAL, 'Could not parse "192.0.2"'),
        (wanted(addresses=["192.0.2.1/x"]), Code.INVALID_ARGUMENT, 'Could not parse "192.0.2.1/x"'),
        (wanted(mtu=0), Code.INTERNAL, "Could not set MTU 0: invalid argument"),
        (wanted(name="other"), Code.INTERNAL, "Could not set name other: file exists"),
        (wanted(name="a b"), Code.INVALID_ARGUMENT, "'a b' is not a valid interface name: 1 to 15 bytes"),
    ],
)
async def test_an_interface_that_cannot_be_made(
    isolated_agent: RunningAgent, request_: Any, code: Code, text: str
) -> None:
    async with isolated_agent.connect() as client:
        found, message = await refused(client.rpc.UpdateInterface(request_))
        assert (found, message[: len(text)]) == (code, text)
        await client.rpc.UpdateInterface(wanted())  # nothing is in the way


async def test_an_interface_that_is_still_to_come(isolated_agent: RunningAgent) -> None:
    async with isolated_agent.connect() as client:
        late = wanted(mac="02:00:00:00:00:77", pciPath="02/01")
        code, text = await refused(client.rpc.UpdateInterface(late))
        assert (code, text) == (
            Code.DEADLINE_EXCEEDED,
            "Timeout reached after 3s waiting for device 02:00:00:00:00:77",
        )
        call = client.rpc.UpdateInterface(late)
        ip(
            isolated_agent,
            "link",
            "add",
            "late",
            "address",
            "02:00:00:00:00:77",
            "type",
            "veth",
            "peer",
            "name",
            "later",
        )
        assert (await call).name == "eth7"


async def test_routes_are_replaced(isolated_agent: RunningAgent) -> None:
    async with isolated_agent.connect() as client:
        await client.rpc.UpdateInterface(wanted(addresses=["192.0.2.10/24", "2001:db8::10/64"]))
        kernels = {("192.0.2.0/24", ""), ("2001:db8::/64", "")}
        assert await table(client) == kernels
        first = routes(
            {"gateway": "203.0.113.1"},  # reached through the next one: the host need not order them
            {"dest": "203.0.113.0/24", "scope": 253},
            {"dest": "2001:db8:1::/48", "gateway": "2001:db8::1"},
        )
        assert await client.rpc.UpdateRoutes(first) == first.routes
        made = {("", "203.0.113.1"), ("203.0.113.0/24", ""), ("2001:db8:1::/48", "2001:db8::1")}
        assert await table(client) == kernels | made
        await client.rpc.UpdateRoutes(routes({"dest": "default", "gateway": "192.0.2.1", "source": "192.0.2.10"}))
        assert await table(client) == kernels | {("", "192.0.2.1")}
        (default,) = ip(isolated_agent, "route", "show", "default")
        assert (default["gateway"], default["prefsrc"]) == ("192.0.2.1", "192.0.2.10")
        # A route the kernel already has is no obstacle; a default route with only a device is ipvlan's.
        await client.rpc.UpdateRoutes(routes({"dest": "192.0.2.0/24", "source": "192.0.2.10", "scope": 253}, {}))
        assert await table(client) == kernels | {("", "")}


@pytest.mark.parametrize(
    "bad, text",
    [
        (
            {"dest": "198.51.100.0/24", "gateway": "10.9.9.9"},
            "Could not add/replace route dest(198.51.100.0/24)/gw(10.9.9.9)/dev(eth7): network is unreachable",
        ),
        ({"dest": "198.51.100.0/77"}, "Could not parse route destination 198.51.100.0/77"),
        ({"dest": "10.0.0.0/8", "device": "none"}, "Could not find link from device none: Link not found"),
        ({"dest": "10.0.0.0/8", "gateway": "2001:db8::1"}, "Could not add/replace route dest(10.0.0.0/8)/gw(2001:db8"),
    ],
)
async def test_routes_are_as_before_when_one_cannot_be_made(
    isolated_agent: RunningAgent, bad: dict[str, Any], text: str
) -> None:
    async with isolated_agent.connect() as client:
        await client.rpc.UpdateInterface(wanted())
        await client.rpc.UpdateRoutes(routes({"dest": "203.0.113.0/24", "scope": 253}, {"gateway": "203.0.113.1"}))
        before = await table(client)
        assert len(before) == 3
        code, message = await refused(client.rpc.UpdateRoutes(routes({"dest": "10.1.0.0/16", "scope": 253}, bad)))
        assert (code, message[: len(text)]) == (Code.INTERNAL, text)
        assert await table(client) == before
        code, message = await refused(client.rpc.UpdateRoutes(agent_pb2.UpdateRoutesRequest()))
        assert (code, message) == (Code.INVALID_ARGUMENT, "Need network routes")


async def test_neighbours(isolated_agent: RunningAgent) -> None:
    def request(**fields: Any) -> Any:
        given = {"device": "eth7", "lladdr": "02:00:00:00:00:0b", **fields}
        if "address" in given:
            given["toIPAddress"] = types_pb2.IPAddress(address=given.pop("address"))
        return agent_pb2.AddARPNeighborsRequest(
            neighbors=agent_pb2.ARPNeighbors(ARPNeighbors=[types_pb2.ARPNeighbor(**given)])
        )

    async with isolated_agent.connect() as client:
        await client.rpc.UpdateInterface(wanted())
        await client.rpc.AddARPNeighbors(request(address="192.0.2.11"))
        (entry,) = ip(isolated_agent, "neigh", "show", "dev", "eth7", "192.0.2.11")
        assert (entry["lladdr"], entry["state"]) == ("02:00:00:00:00:0b", ["PERMANENT"])
        for bad, code, text in (
            (request(), Code.INVALID_ARGUMENT, "an ARP neighbor needs toIPAddress"),
            (agent_pb2.AddARPNeighborsRequest(), Code.INVALID_ARGUMENT, "Need ARP neighbors"),
            (
                request(address="192.0.2.11"),
                Code.INTERNAL,
                "Could not add ARP neighbor 192.0.2.11 on eth7: file exi",
            ),
            (request(address="x"), Code.INTERNAL, 'Could not parse "x"'),
            (request(address="192.0.2.12", device="no"), Code.INTERNAL, "Could not find link from device no"),
            (request(address="192.0.2.12", lladdr="zz"), Code.INTERNAL, "Could not add ARP neighbor 192.0.2.12 on"),
        ):
            found, message = await refused(client.rpc.AddARPNeighbors(bad))
            assert (found, message[: len(text)]) == (code, text)

"""Configure a guest's network: the VM's starter knows the addresses, so the guest needs no DHCP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caisson.agent.client.connection import Agent
from caisson.proto.kata3 import agent_pb2, types_pb2

#: The guest's kernel module, if it is not built in.
DRIVER = "virtio_net"


async def configure(agent: Agent, network: Mapping[str, Any]) -> None:
    """Give the guest address, default route and name servers; does nothing if ``network`` is of kind "none".

    ``network`` is vm.json's: interface, mac, address, prefix, gateway, dns, mtu.  Raises AgentError.
    """
    if network.get("kind", "none") == "none":
        return
    await agent.load_module(DRIVER)
    name = str(network["interface"])
    address = types_pb2.IPAddress(family="v4", address=network["address"], mask=str(network["prefix"]))
    interface = types_pb2.Interface(
        device=name, name=name, IPAddresses=[address], mtu=network["mtu"], hwAddr=network["mac"]
    )
    await agent.rpc.UpdateInterface(agent_pb2.UpdateInterfaceRequest(interface=interface))
    route = types_pb2.Route(gateway=network["gateway"], device=name)
    await agent.rpc.UpdateRoutes(agent_pb2.UpdateRoutesRequest(routes=agent_pb2.Routes(Routes=[route])))
    await agent.create_sandbox(dns=[f"nameserver {server}" for server in network["dns"]])

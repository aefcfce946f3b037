"""The services of a Kata 1.x agent, tied to their handlers: imported when the first host that speaks gRPC connects."""

from __future__ import annotations

from caisson.agent.api.kata1.guest import GuestService
from caisson.agent.api.kata1.service import AgentService
from caisson.agent.rpc.dispatch import Service
from caisson.proto.kata1 import agent_pb2

AGENT = Service(agent_pb2.DESCRIPTOR.services_by_name["AgentService"], AgentService, GuestService)

"""The services of a Kata 3.x agent, tied to their handlers: imported when the first such host has connected."""

from __future__ import annotations

from caisson.agent.api.kata3.guest import GuestService
from caisson.agent.api.kata3.service import AgentService, WriteStreamRequest
from caisson.agent.rpc.dispatch import Service
from caisson.proto.kata3 import agent_pb2

AGENT = Service(
    agent_pb2.DESCRIPTOR.services_by_name["AgentService"],
    AgentService,
    GuestService,
    requests={"WriteStdin": WriteStreamRequest},
)

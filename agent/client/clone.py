"""A guest made from a template is told who it is and what time it is, and gets random numbers of its own."""

from __future__ import annotations

import asyncio
import os
import uuid
from pathlib import Path

from caisson.agent.client.clock import set_clock
from caisson.agent.client.connection import Agent, AgentError, answers
from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata1 import agent_pb2

#: Bytes of entropy: what the kernel's generator is keyed with, twice.
ENTROPY = 64

#: Seconds for each call.
PATIENCE = 60.0


async def settle(agent: Agent, hostname: str, machine_id: str = "") -> None:
    """Make a clone a machine of its own: to be done before its first container starts.

    ``machine_id``: 32 hexadecimal digits, by default random ones.  Raises AgentError.
    """
    identity = caisson_pb2.IdentifyRequest(hostname=hostname, machine_id=machine_id or uuid.uuid4().hex)
    await asyncio.gather(
        agent.rpc.ReseedRandomDev(agent_pb2.ReseedRandomDevRequest(data=os.urandom(ENTROPY)), PATIENCE),
        agent.guest.Identify(identity, PATIENCE),
        set_clock(agent),
    )


def settled(socket: Path, hostname: str) -> bool:
    """Whether the agent of a clone answers, and if so, it is a machine of its own now: a `ready` for VM.start."""
    if not answers(socket, timeout=1.0):
        return False

    async def work() -> None:
        async with Agent.connect(socket) as agent:
            await settle(agent, hostname)

    try:
        asyncio.run(work())
    except AgentError:
        return False
    return True

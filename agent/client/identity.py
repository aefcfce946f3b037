"""Give a clone its own identity: host name, machine id, random numbers and clock; set a guest's clock.

    python -m caisson.agent.client.identity SOCKET     set the clock of the guest behind a VM's agent.sock

A clone's clock shows the time of its snapshot; any guest's clock stops while its host is suspended.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import uuid
from pathlib import Path

from caisson.agent.client.connection import Agent
from caisson.agent.client.errors import AgentError
from caisson.agent.client.readiness import is_serving
from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata3 import agent_pb2

#: Bytes of entropy: twice the key of the kernel's generator.
ENTROPY_BYTES = 64

#: Maximum error of the clock in seconds, and attempts to reach it on a busy machine.
MAX_ERROR = 0.5
MAX_ATTEMPTS = 5

#: Seconds for each call.
CALL_TIMEOUT = 60.0


async def personalize(agent: Agent, hostname: str) -> None:
    """Give a clone its own host name, machine id, entropy and clock, before its first container starts.

    Raises AgentError.
    """
    identity = caisson_pb2.IdentifyRequest(hostname=hostname, machine_id=uuid.uuid4().hex)
    await asyncio.gather(
        agent.rpc.ReseedRandomDev(agent_pb2.ReseedRandomDevRequest(data=os.urandom(ENTROPY_BYTES)), CALL_TIMEOUT),
        agent.guest.Identify(identity, CALL_TIMEOUT),
        set_clock(agent),
    )


def is_personalized(socket: Path, hostname: str) -> bool:
    """Personalize a clone once its agent serves; usable as the `ready` of VM.start."""
    if not is_serving(socket, timeout=1.0):
        return False

    async def work() -> None:
        async with Agent.connect(socket, "ttrpc") as agent:
            await personalize(agent, hostname)

    try:
        asyncio.run(work())
    except AgentError:
        return False
    return True


async def set_clock(agent: Agent) -> None:
    """Set the guest's clock to this host's.  Raises AgentError."""
    for _ in range(MAX_ATTEMPTS):
        now = time.time_ns()
        seconds, rest = divmod(now, 10**9)
        await agent.rpc.SetGuestDateTime(
            agent_pb2.SetGuestDateTimeRequest(Sec=seconds, Usec=rest // 1000), CALL_TIMEOUT
        )
        if time.time_ns() - now < MAX_ERROR * 1e9:
            return


async def main() -> None:
    """Set the clock of the guest that argv[1] names."""
    async with Agent.connect(sys.argv[1], "ttrpc") as agent:
        await set_clock(agent)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except AgentError as error:
        sys.exit(f"the guest's clock could not be set: {error}")

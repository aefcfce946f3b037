"""A guest's clock, set to this machine's.

    python -m caisson.agent.client.clock SOCKET     SOCKET: a VM's agent.sock

A clone's clock is at the time of its template; that of any guest stands still while its host is suspended.
"""

from __future__ import annotations

import asyncio
import sys
import time

from caisson.agent.client.connection import Agent, AgentError
from caisson.proto.kata1 import agent_pb2

#: Seconds that a clock may be off, and how often it is set again where a busy machine takes longer than that.
PRECISION = 0.5
ATTEMPTS = 5

#: Seconds for each call.
PATIENCE = 60.0


async def set_clock(agent: Agent) -> None:
    """Raises AgentError."""
    for _ in range(ATTEMPTS):
        now = time.time_ns()
        seconds, rest = divmod(now, 10**9)
        await agent.rpc.SetGuestDateTime(agent_pb2.SetGuestDateTimeRequest(Sec=seconds, Usec=rest // 1000), PATIENCE)
        if time.time_ns() - now < PRECISION * 1e9:
            return


async def main() -> None:
    """The command line."""
    async with Agent.connect(sys.argv[1]) as agent:
        await set_clock(agent)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except AgentError as error:
        sys.exit(f"the guest's clock could not be set: {error}")

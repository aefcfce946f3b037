"""The host's side: drive the agent in a guest from Python.

async with Agent.connect("/run/caisson/default/agent.sock") as agent:
    await agent.create_sandbox()
    container = await agent.create_container("web", default_spec(rootfs="/usr/lib/caisson/containers/busybox"))
    await container.start()
    process = await container.exec(["echo", "hello"])
    async for data in process.stdout():
        ...
    status = await process.wait()
"""

from caisson.agent.client.attach import OutputError, attach
from caisson.agent.client.boot_times import BootTimes, boot_times
from caisson.agent.client.clone import settle, settled
from caisson.agent.client.connection import (
    Agent,
    AgentError,
    AgentGone,
    Container,
    FirstAnswer,
    Process,
    ProgramError,
    answers,
)
from caisson.agent.client.defaults import PATH, default_spec, keep_alive
from caisson.agent.client.errors import Mistake
from caisson.agent.client.registry import Known

__all__ = [
    "PATH",
    "Agent",
    "AgentError",
    "AgentGone",
    "BootTimes",
    "Container",
    "FirstAnswer",
    "Known",
    "Mistake",
    "OutputError",
    "Process",
    "ProgramError",
    "answers",
    "attach",
    "boot_times",
    "default_spec",
    "keep_alive",
    "settle",
    "settled",
]

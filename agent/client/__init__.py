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
from caisson.agent.client.connection import (
    Agent,
    AgentError,
    AgentGone,
    Container,
    Process,
    ProgramError,
    ReadinessProbe,
    is_serving,
)
from caisson.agent.client.diagnostics import BootTimes, boot_times
from caisson.agent.client.errors import UsageError
from caisson.agent.client.identity import is_personalized, personalize
from caisson.agent.client.registry import Registry
from caisson.agent.client.specs import PATH, default_spec, keep_alive

__all__ = [
    "PATH",
    "Agent",
    "AgentError",
    "AgentGone",
    "BootTimes",
    "Container",
    "OutputError",
    "Process",
    "ProgramError",
    "ReadinessProbe",
    "Registry",
    "UsageError",
    "attach",
    "boot_times",
    "default_spec",
    "is_personalized",
    "is_serving",
    "keep_alive",
    "personalize",
]

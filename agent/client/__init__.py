"""The client side: drive the agent in a guest from Python.

async with Agent.connect("/run/caisson/default/agent.sock") as agent:
    await agent.create_sandbox()
    container = await agent.create_container("web", default_spec(rootfs="/usr/lib/caisson/containers/busybox"))
    await container.start()
    process = await container.exec(["echo", "hello"])
    async for data in process.stdout():
        ...
    status = await process.wait()

Modules are imported on first use: a command does not pay for what it does not need.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from caisson.agent.client.caller import PATH, OutputError
    from caisson.agent.client.connection import Agent, Container, Process
    from caisson.agent.client.diagnostics import BootTimes, boot_times
    from caisson.agent.client.errors import AgentError, AgentGone, ProgramError, Reason, UsageError
    from caisson.agent.client.identity import is_personalized, personalize
    from caisson.agent.client.readiness import ReadinessProbe, is_serving
    from caisson.agent.client.registry import Registry
    from caisson.agent.client.specs import default_spec, keep_alive
    from caisson.agent.client.stdio import attach
    from caisson.agent.rpc.codes import StatusCode

_FROM = {
    "Agent": "caisson.agent.client.connection",
    "AgentError": "caisson.agent.client.errors",
    "AgentGone": "caisson.agent.client.errors",
    "BootTimes": "caisson.agent.client.diagnostics",
    "Container": "caisson.agent.client.connection",
    "OutputError": "caisson.agent.client.caller",
    "PATH": "caisson.agent.client.caller",
    "Process": "caisson.agent.client.connection",
    "ProgramError": "caisson.agent.client.errors",
    "ReadinessProbe": "caisson.agent.client.readiness",
    "Reason": "caisson.agent.client.errors",
    "Registry": "caisson.agent.client.registry",
    "StatusCode": "caisson.agent.rpc.codes",
    "UsageError": "caisson.agent.client.errors",
    "attach": "caisson.agent.client.stdio",
    "boot_times": "caisson.agent.client.diagnostics",
    "default_spec": "caisson.agent.client.specs",
    "is_personalized": "caisson.agent.client.identity",
    "is_serving": "caisson.agent.client.readiness",
    "keep_alive": "caisson.agent.client.specs",
    "personalize": "caisson.agent.client.identity",
}

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
    "Reason",
    "Registry",
    "StatusCode",
    "UsageError",
    "attach",
    "boot_times",
    "default_spec",
    "is_personalized",
    "is_serving",
    "keep_alive",
    "personalize",
]


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FROM[name]), name)

"""List the processes of containers, sample their resource usage, and signal them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from caisson.agent.client.connection import Agent, Container
from caisson.agent.client.errors import AgentError, Reason, UsageError
from caisson.agent.client.registry import Registry
from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata3 import agent_pb2

T = TypeVar("T")

#: The columns of `ps -ef`, by their names here; the last one may contain spaces.
COLUMNS = ("uid", "pid", "ppid", "cpu", "started", "tty", "time", "command")
NUMBERS = ("uid", "pid", "ppid", "cpu")

#: The fields of a container's usage.
USAGE = ("container", "cpu_percent", "cpu_seconds", "memory", "memory_limit", "pids", "pids_limit")

#: Seconds between two checks that an idle agent is still there.
ALIVE_INTERVAL = 2.0

#: From here on a limit means none: cgroups have several numbers for "no limit", all beyond any machine's memory.
UNLIMITED = 1 << 60


async def processes(agent: Agent, known: Registry, container: str = "") -> list[dict[str, Any]]:
    """List the processes of a container, or of all.

    Each is {"container", "status", "processes": [{"uid", "pid", …}], "exit_status"}.  The status is created, running,
    paused or stopped; pids are the guest's.  One that has exited has no processes, and an exit status; others have none
    (None).
    """

    async def listed(container_id: str) -> dict[str, Any]:
        answer = await agent.guest.ListProcesses(caisson_pb2.ListProcessesRequest(container_id=container_id))
        found = parse_table(answer.table)
        status = None if found else await agent.container(container_id).init().wait()
        return {"container": container_id, "status": answer.status, "processes": found, "exit_status": status}

    return await _each(known, container, listed)


def parse_table(text: str) -> list[dict[str, Any]]:
    """Parse the output of `ps -ef`; ``cpu`` is a percentage.

    A process chooses its own command line, even with newlines: a line that is not a row is shown as a command.
    """
    found: list[dict[str, Any]] = []
    for line in filter(None, text.split("\n")[1:]):
        row: dict[str, Any] = dict(zip(COLUMNS, line.split(None, len(COLUMNS) - 1), strict=False))
        try:
            found.append(row | {name: int(row[name]) for name in NUMBERS})
        except (KeyError, ValueError):
            found.append({"command": line})
    return found


async def stats(agent: Agent, known: Registry, container: str = "", interval: float = 1.0) -> list[dict[str, Any]]:
    """Sample the usage of a container, or of all: {"container", "cpu_percent", "cpu_seconds", "memory", "memory_limit",
    "pids", "pids_limit"} each.

    Memory in bytes; 100 % is one CPU, over ``interval`` seconds; no limit is None.
    """

    async def sampled(container_id: str) -> tuple[str, float, Any]:
        answer = await agent.rpc.StatsContainer(agent_pb2.StatsContainerRequest(container_id=container_id))
        return container_id, time.monotonic(), answer.cgroup_stats

    before = await _each(known, container, sampled)
    await _sleep_beside(agent, interval)
    first = {container_id: (when, used) for container_id, when, used in before}
    after = await _each(known, container, sampled)
    return [usage(name, *first[name], when, used) for name, when, used in after if name in first]


async def _sleep_beside(agent: Agent, seconds: float) -> None:
    """Sleep, checking periodically that the agent is still there.  Raises AgentGone."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > ALIVE_INTERVAL:
        await asyncio.sleep(ALIVE_INTERVAL)
        await agent.version()
    await asyncio.sleep(max(left, 0.0))


def usage(container_id: str, before: float, first: Any, after: float, last: Any) -> dict[str, Any]:
    """Compute usage from two samples (grpc.CgroupStats) and their times in seconds."""
    busy = last.cpu_stats.cpu_usage.total_usage - first.cpu_stats.cpu_usage.total_usage
    return {
        "container": container_id,
        "cpu_percent": round(busy / 1e7 / max(after - before, 1e-3), 1),  # nanoseconds per second
        "cpu_seconds": round(last.cpu_stats.cpu_usage.total_usage / 1e9, 3),
        "memory": last.memory_stats.usage.usage,
        "memory_limit": _limit(last.memory_stats.usage.limit),
        "pids": last.pids_stats.current,
        "pids_limit": _limit(last.pids_stats.limit),
    }


def _limit(value: int) -> int | None:
    return value if 0 < value < UNLIMITED else None


async def _each(known: Registry, container: str, ask: Callable[[str], Awaitable[T]]) -> list[T]:
    """Query one container, or all in the registry.

    Entries of containers that no longer exist are removed, except those that a command is creating.
    """
    if container:
        return [await ask(container)]
    found = []
    for name in known.names():
        try:
            found.append(await ask(name))
        except AgentError as error:
            if error.reason is not Reason.CONTAINER_NOT_FOUND:
                raise
            if not known.held(name):
                known.discard(name)
    return found


async def signal_container(container: Container, number: int, *, everything: bool = False) -> None:
    """Signal the init process of a container, or all processes."""
    await (container.signal(number) if everything else container.init().signal(number))


def signal_number(text: str) -> int:
    """Parse a signal: "9", "KILL", "SIGKILL", "RTMIN+3".  Raises UsageError."""
    name, plus, more = text.upper().removeprefix("SIG").partition("+")
    try:
        number = int(name) if name.isdecimal() else int(signal.Signals[f"SIG{name}"])
        number += int(more) if plus else 0
    except (KeyError, ValueError):
        raise UsageError(f"{text!r}: is not a signal; use HUP, INT, KILL, TERM, USR1 … or 1 to 64") from None
    if not 1 <= number <= signal.SIGRTMAX:
        raise UsageError(f"{text!r}: is not a signal; use 1 to {int(signal.SIGRTMAX)}")
    return number

"""Read a guest's diagnostics: the agent's log on its console, and the times of its boot steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from caisson.agent.client.connection import Agent
from caisson.proto.caisson import caisson_pb2

#: Round trips to compare the clocks: the quickest one has the least error.
MAX_COMPARISONS = 10

#: Seconds for each call.
CALL_TIMEOUT = 60.0


@dataclass(frozen=True)
class BootTimes:
    """All times are seconds, of the guest's CLOCK_MONOTONIC.

    ``marks`` are named points of the agent's start, ``imports`` its modules with begin and end (only in a guest booted
    with agent.timeline), ``kernel_log`` the records of /dev/kmsg; this host's CLOCK_MONOTONIC is ``ahead`` of the
    guest's, plus or minus ``error``.
    """

    marks: list[tuple[str, float]]
    imports: list[tuple[str, float, float]]
    kernel_log: str
    ahead: float
    error: float


async def boot_times(socket: Path) -> BootTimes:
    """Read the boot times from an agent.  Raises AgentError."""
    async with Agent.connect(socket, "ttrpc") as agent:
        best: tuple[float, float] | None = None
        for _ in range(MAX_COMPARISONS):
            asked = time.monotonic()
            answer = await agent.guest.GetBootTimes(caisson_pb2.GetBootTimesRequest(only_now=True), CALL_TIMEOUT)
            took = time.monotonic() - asked
            if best is None or took < best[0]:
                best = took, asked + took / 2 - answer.now / 1e6
        assert best is not None
        answer = await agent.guest.GetBootTimes(caisson_pb2.GetBootTimesRequest(), CALL_TIMEOUT)
    return BootTimes(
        [(mark.place, mark.reached / 1e6) for mark in answer.marks],
        [(one.module, one.began / 1e6, one.ended / 1e6) for one in answer.imports],
        answer.kernel_log,
        ahead=best[1],
        error=best[0] / 2,
    )


#: Maximum bytes of a line of the agent's log.
MAX_LINE = 64 << 10


class AgentLines:
    """Extract the agent's lines (JSON with a level) from a console's output, which may arrive in any pieces."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._rest = b""

    def __call__(self, data: bytes) -> None:
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[:MAX_LINE]  # the beginning of a longer one, which is not a document
        found = [line.rstrip(b"\r") for line in lines if _is_logged(line)]
        if found:
            self._write(b"\n".join([*found, b""]))


def _is_logged(line: bytes) -> bool:
    if len(line) >= MAX_LINE:
        return False
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):  # a container can write to the console, too: `[` 200,000 times
        return False
    return isinstance(document, dict) and {"level", "msg"} <= document.keys()

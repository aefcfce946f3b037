"""Measure the agent over ttrpc against the same calls over gRPC, one after the other on two connections."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from caisson.agent.client import Agent, Container
from caisson.proto.kata1 import health_pb2
from tests.bench.rows import Row

CALL_BUDGET, EXEC_BUDGET, ECHO_BUDGET, BULK_BUDGET = 0.5, 0.9, 1.0, 1.0

#: Calls averaged in a sample of an empty call, and how many times more such samples are taken.
CALLS, MORE = 5, 4


async def measure(
    socket: Path,
    container_id: str,
    samples: int,
    size: int,
    first_byte: Callable[[Container], Awaitable[float]],
    echo: Callable[[Container], Awaitable[float]],
    bulk: Callable[[Container, int], Awaitable[float]],
) -> list[Row]:
    """Return all rows; the functions return milliseconds per container, the last one per MiB."""
    async with Agent.connect(socket, "grpc") as grpc, Agent.connect(socket, "ttrpc") as ttrpc:
        agents = (ttrpc, grpc)
        ours, peers = (agent.container(container_id) for agent in agents)

        async def row(what: str, count: int, budget: float, one: Callable[[Any], Awaitable[float]]) -> Row:
            subjects = agents if one is empty_calls else (ours, peers)
            pairs = [[await one(subject) for subject in subjects] for _ in range(count + 2)]
            # On a busy machine the median measures other load, the same on both sides.
            own, peer = (statistics.quantiles(column, n=4)[0] for column in zip(*pairs[2:], strict=True))
            return Row.beside(f"{what}, beside the same by gRPC (ms)", own, peer, budget)

        return [
            await row("an empty call by ttrpc", samples * MORE, CALL_BUDGET, empty_calls),
            await row("ExecProcess by ttrpc to first byte", samples, EXEC_BUDGET, first_byte),
            await row("WriteStdin by ttrpc to echo in ReadStdout", samples, ECHO_BUDGET, echo),
            await row("stdout by ttrpc, a MiB", 5, BULK_BUDGET, lambda one: bulk(one, size)),
        ]


async def empty_calls(agent: Agent) -> float:
    """Return the milliseconds of an empty call."""
    began = time.perf_counter()
    for _ in range(CALLS):
        await agent.health.Check(health_pb2.CheckRequest())
    return (time.perf_counter() - began) * 1000 / CALLS

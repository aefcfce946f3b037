"""Measure one agent with hundreds of containers and a thousand streams: growth, and idle CPU time.

    python -m tests.bench.scale [--containers N] [--streams N] [--execs N]

Prints rows as JSON.  The agent runs on this machine: growth with containers is the agent's, not the emulated guest's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from caisson.agent.client import Agent, Container
from caisson.agent.client.connection import Process
from tests.bench.native import MESSAGE, first_byte
from tests.bench.rows import Row
from tests.bench.runtime_latency import ROOT
from tests.bench.vsock import busy
from tests.native.agent_support import RunningAgent
from tests.native.nsexec_support import make_rootfs

CONTAINERS, STREAMS, EXECS = 500, 1000, 1000
STEP = 100

#: Relative to one container, the first exec, one stream.
FLAT_BUDGET, AT_ONCE_BUDGET = 1.3, 1.0

#: Milliseconds of CPU time an agent with all of these containers may use in so many seconds.
IDLE_BUDGET, IDLE_TIME = 1.0, 3.0


async def lowest(container: Container) -> float:
    """Return the milliseconds of an exec, as a minimum: on a busy machine the median measures other load."""
    return statistics.quantiles([await first_byte(container) for _ in range(60)], n=10)[0]


async def flat(agent: Agent, running: RunningAgent, container: Container, count: int, execs: int) -> list[Row]:
    """Measure exec latency with many containers, and after many execs, against the same agent with one container.

    The latter is measured before and after, because other load varies.
    """
    found: dict[str, float] = {}
    more: list[Container] = []
    before = await lowest(container)
    for wanted in sorted({STEP, count}):
        while len(more) + 1 < wanted:
            one = await agent.create_container(f"c{len(more)}", running.spec("/bin/sleep", "1000000"))
            await one.start()
            more.append(one)
        found[f"exec latency at {wanted} containers, beside 1 (ms)"] = await lowest(container)
    idle = await idle_time(running)
    for one in more:
        await one.remove()
    base = statistics.mean([before, await lowest(container)])
    for _ in range(execs):
        await first_byte(container)
    found[f"exec latency after {execs} execs, beside the first (ms)"] = await lowest(container)
    what = f"processor time of an idle agent with {count} containers in {IDLE_TIME:.0f} s (ms)"
    return [
        *(Row.beside(what, figure, base, FLAT_BUDGET) for what, figure in found.items()),
        Row(what, idle, budget=IDLE_BUDGET),
    ]


async def idle_time(running: RunningAgent) -> float:
    """Return the milliseconds of CPU time an idle agent uses."""
    before = busy(running.pid)
    await asyncio.sleep(IDLE_TIME)
    return busy(running.pid) - before


async def echo(process: Process) -> None:
    """Send a message to `cat` and back, with a ReadStdout already waiting."""
    reading = asyncio.ensure_future(anext(process.stdout()))
    await asyncio.sleep(0)
    await process.write(MESSAGE)
    assert await reading == MESSAGE


async def streams(container: Container, count: int) -> Row:
    """Measure the time of an echo with many in progress, each with its ReadStdout, against one after the other."""
    processes = [await container.exec(["/bin/cat"]) for _ in range(count)]

    async def at_once() -> float:
        began = time.perf_counter()
        await asyncio.gather(*map(echo, processes))
        return (time.perf_counter() - began) * 1000 / count

    async def in_turn() -> float:
        began = time.perf_counter()
        for process in processes:
            await echo(process)
        return (time.perf_counter() - began) * 1000 / count

    pairs = [(await at_once(), await in_turn()) for _ in range(4)]
    many, one = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
    waits = [asyncio.ensure_future(process.wait()) for process in processes]
    await asyncio.gather(*(process.close_stdin() for process in processes))
    assert not any(await asyncio.gather(*waits))
    what = f"an echo through `cat`, {count} ReadStdout at once, beside one at a time (ms)"
    return Row.beside(what, many, one, AT_ONCE_BUDGET)


async def measure(running: RunningAgent, containers: int, streams_: int, execs: int) -> list[Row]:
    """Return all rows."""
    async with Agent.connect(running.socket, "ttrpc") as agent:
        await agent.create_sandbox()
        container = await agent.create_container("bench", running.spec())
        await container.start()
        rows = [*await flat(agent, running, container, containers, execs), await streams(container, streams_)]
        await container.remove()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scale", description=__doc__.partition("\n")[0])
    parser.add_argument("--containers", type=int, default=CONTAINERS, help="of one agent (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=STREAMS, help="read at once (default: %(default)s)")
    parser.add_argument("--execs", type=int, default=EXECS, help="one after the other (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="caisson-bench-") as directory:
        work = Path(directory)
        subprocess.run(["make", "-s", "-C", ROOT / "agent/nsexec", f"BUILD={work}"], check=True)
        running = RunningAgent(work, work / "nsexec", make_rootfs(work / "rootfs"), "--log", "info")
        try:
            rows = asyncio.run(measure(running, options.containers, options.streams, options.execs))
        finally:
            running.stop()
    json.dump([row.plain() for row in rows], sys.stdout)


if __name__ == "__main__":
    main()

"""Run thousands of containers and execs in one guest: descriptors, memory, disk and mounts are flat on both sides.

CAISSON_SOAK is the number of each ("200,1000"; "10000,50000" for the full run, which takes an hour under emulation).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from caisson.agent.client import Agent, default_spec
from tests.e2e.conftest import COMPILE_TIMEOUT, Caisson
from tests.e2e.test_vsock_load import private_memory
from tests.support.poll import wait_until

CONTAINERS, EXECS = map(int, os.environ.get("CAISSON_SOAK", "200,1000").split(","))

pytestmark = [
    pytest.mark.root,
    pytest.mark.vm,
    pytest.mark.nightly,
    pytest.mark.timeout(COMPILE_TIMEOUT + 2 * CONTAINERS + EXECS),
]

NAME = "soak"
ROUNDS, CONCURRENCY = 6, 8

#: KiB by which a process, and the files of a side, may have grown in the second half: an allocator's pages and a log
#: line, but no leak; in the full run's second half, 5,000 containers leaking 4 KiB each would be 20 MiB.
MEMORY_GROWTH, DISK_GROWTH = 4096, 1024

#: The guest's resources, one number per line: descriptors and KiB of the agent, mounts, cgroups, KiB in its file
#: systems.
LOOK = """
ls /proc/1/fd | wc -l
sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\) kB/\\1/p' /proc/1/status
wc -l </proc/1/mountinfo
find /sys/fs/cgroup -type d | wc -l
du -skx /run | cut -f1
"""


@dataclass(frozen=True)
class Side:
    """The resources of one side: counts that must be equal, and KiB that may grow a little."""

    counts: dict[str, int]
    memory: dict[str, int]
    disk: int


Look = Callable[[Caisson], Side]


def guest(own: Caisson) -> Side:
    done = own("exec", "--name", NAME, "--guest", "--", "sh", "-c", LOOK)
    assert done.returncode == 0, done.stderr.decode()
    fds, resident, mounts, cgroups, disk = map(int, done.stdout.split())
    return Side({"descriptors": fds, "mounts": mounts, "cgroups": cgroups}, {"agent": resident}, disk)


def host(own: Caisson) -> Side:
    pids = own.info(NAME)["pids"]
    counts = {f"descriptors of {name}": len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in pids.items()}
    counts["mounts"] = len(Path(f"/proc/{pids['supervisor']}/mountinfo").read_text().splitlines())
    counts["files"] = len(list(own.run_directory.rglob("*")))
    # Not QEMU's: it keeps translated code, which is bounded and grows with new code.
    memory = {name: private_memory(pid) for name, pid in pids.items() if name != "qemu"}
    disk = sum(path.lstat().st_blocks for path in own.run_directory.rglob("*")) // 2
    return Side(counts, memory, disk)


def check_flat(before: Side, look: Callable[[], Side]) -> None:
    """Compare with the counts before; a connection just closed may still be counted for a moment."""
    wait_until(lambda: look().counts == before.counts, f"as many as before: {before.counts}", found=look)
    now = look()
    assert now.disk - before.disk < DISK_GROWTH, (before, now)
    for name, kib in now.memory.items():
        assert kib - before.memory[name] < MEMORY_GROWTH, (name, before, now)


async def one_round(own: Caisson, root: str, number: int) -> None:
    """Create, start and remove part of the containers, and run part of the execs, some of each at once."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def gated(work: Callable[[], Awaitable[None]]) -> None:
        async with gate:
            await work()

    async with Agent.connect(own.run_directory / NAME / "agent.sock", "ttrpc") as agent:
        base = await agent.ensure_container("base", default_spec(root, ["/bin/sleep", "1000000"]))

        def container(index: int) -> Callable[[], Awaitable[None]]:
            async def work() -> None:
                spec = default_spec(root, ["/bin/sleep", "1000000"])
                made = await agent.create_container(f"c{number}-{index}", spec)
                await made.start()
                await made.remove()

            return work

        async def execute() -> None:
            process = await base.exec(["/bin/echo", "x"])
            assert b"".join([data async for data in process.stdout()]) == b"x\n"
            assert await process.wait() == 0

        works = [*map(container, range(CONTAINERS // ROUNDS)), *[execute] * (EXECS // ROUNDS)]
        await asyncio.gather(*map(gated, works))


def test_containers_and_execs_leave_nothing_on_either_side(own: Caisson) -> None:
    booted = own("boot-vm", "--name", NAME, "--detach")
    assert booted.returncode == 0, booted.stderr.decode()
    root = own.manifest(NAME)["containers"]["busybox"]
    middle: dict[Look, Side] = {}
    for number in range(ROUNDS):
        asyncio.run(one_round(own, root, number))
        if number == ROUNDS // 2 - 1:
            middle = {look: look(own) for look in (guest, host)}
    for look, before in middle.items():
        check_flat(before, partial(look, own))
    assert own("stop-vm", "--all").returncode == 0

"""Test what a hostile container can do to the guest and to its neighbour: nothing, and it stops nobody."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caisson.agent.client import Agent, Container, default_spec
from caisson.agent.client.copy import copy
from caisson.agent.client.errors import AgentError
from caisson.agent.client.guest import Guest
from caisson.agent.guest import cgroupfs
from caisson.agent.libcontainer.cgroups.v2.cgroup import NESTING
from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata3 import agent_pb2
from tests.e2e.conftest import ROOT, TIMEOUT, Caisson

pytestmark = [pytest.mark.vm, pytest.mark.timeout(2 * TIMEOUT)]

#: How often each operation is done, and how much longer it may take beside a hostile container.
TIMES, FACTOR = 5, 5

FORK_BOMB = 'f=\'while :; do sh -c "$f" & done\'; export f; while :; do sh -c "$f" 2>/dev/null; done'
MEMORY_HOG = "while :; do tail /dev/zero; done"
LOG_FLOOD = "yes a line of a log that nobody has asked for & yes and its errors >&2"

Operation = Callable[[], Awaitable[object]]


@pytest.fixture(scope="module")
def hog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a program that exhausts what the kernel counts per user (tests/guest/hog.c)."""
    program = tmp_path_factory.mktemp("hog") / "hog"
    subprocess.run(["musl-gcc", "-O2", "-Wall", "-static", "-s", "-o", program, ROOT / "tests/guest/hog.c"], check=True)
    return program


def machine(vm: Caisson) -> Any:
    directory = vm.run_directory / "default"
    return SimpleNamespace(directory=directory, agent_socket=directory / "agent.sock")


async def run(container: Container, *words: str) -> bytes:
    process = await container.exec(list(words), env=["PATH=/bin"])
    output = b"".join([data async for data in process.stdout()])
    assert await process.wait() == 0, words
    return output


def operations(vm: Caisson, agent: Agent, quiet: Container, directory: Path) -> dict[str, Operation]:
    """Return operations that must keep working in a container, whatever its neighbour does."""
    name = quiet.id

    async def copy_both_ways() -> None:
        await asyncio.to_thread(copy, machine(vm), str(directory / "file"), f"{name}:/tmp/there")
        await asyncio.to_thread(copy, machine(vm), f"{name}:/tmp/there", str(directory / "back"))
        assert (directory / "back").read_bytes() == (directory / "file").read_bytes()

    async def listed() -> None:
        answer = await agent.guest.ListProcesses(caisson_pb2.ListProcessesRequest(container_id=name))
        assert "sleep" in answer.table

    async def stats() -> None:
        await agent.rpc.StatsContainer(agent_pb2.StatsContainerRequest(container_id=name))

    return {"exec": lambda: run(quiet, "true"), "ps": listed, "cp": copy_both_ways, "stats": stats}


async def times(wanted: dict[str, Operation]) -> dict[str, float]:
    """Return the median time of each, in seconds."""
    found: dict[str, list[float]] = {name: [] for name in wanted}
    for _ in range(TIMES):
        for name, operation in wanted.items():
            began = time.monotonic()
            await operation()
            found[name].append(time.monotonic() - began)
    return {name: statistics.median(values) for name, values in found.items()}


async def test_a_hostile_neighbour_slows_nobody_by_much(vm: Caisson, hog: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100_000))
    async with Guest(machine(vm)) as guest:
        quiet, hostile = await guest.container("quiet"), await guest.container("hostile")
        flood = default_spec(vm.manifest("default")["containers"]["busybox"], ["/bin/sh", "-c", LOG_FLOOD])
        flooding = await guest.agent.create_container("flood", flood)
        await guest.agent.guest.KeepLog(caisson_pb2.KeepLogRequest(container_id="flood", max_bytes=1 << 20))
        try:
            wanted = operations(vm, guest.agent, quiet, tmp_path)
            await times(wanted)
            before = await times(wanted)
            await asyncio.to_thread(copy, machine(vm), str(hog), "hostile:/tmp/hog")
            hogs = [await hostile.exec(["/tmp/hog"])]
            print((await anext(hogs[0].stdout())).decode())
            await flooding.start()
            for script in (MEMORY_HOG, FORK_BOMB):
                hogs.append(await hostile.exec(["/bin/sh", "-c", script], env=["PATH=/bin"]))
            await asyncio.sleep(3)
            after = await times(wanted)
            print({name: f"{before[name] * 1000:.0f} -> {after[name] * 1000:.0f} ms" for name in before})
            for name in before:
                assert after[name] < FACTOR * before[name], (name, before, after)
        finally:
            for container in (hostile, flooding, quiet):
                await container.remove()


async def in_guest(vm: Caisson, agent: Agent, script: str) -> str:
    """Run a script in the guest's own root, with the guest's /proc."""
    busybox = vm.manifest("default")["containers"]["busybox"] + "/bin/busybox"
    spec = default_spec("/", [busybox, "sh", "-c", script])
    del spec.Mounts[:]
    container = await agent.create_container("guest", spec)
    try:
        await container.start()
        output = b"".join([data async for data in container.init().stdout()])
        assert await container.init().wait() == 0, output
        return output.decode()
    finally:
        await container.remove()


async def test_the_agent_is_protected_and_containers_leave_it_tasks(vm: Caisson) -> None:
    async with Guest(machine(vm)) as guest:
        box = await guest.container("box")
        try:
            files = " ".join(f"/sys/fs/cgroup/agent/{name}" for name in ("memory.min", "cpu.weight"))
            limits = "/sys/fs/cgroup/containers/pids.max /proc/sys/kernel/threads-max"
            script = f"cat /proc/1/oom_score_adj /proc/1/cgroup {files} {limits}"
            busybox = vm.manifest("default")["containers"]["busybox"] + "/bin/busybox"
            said = (await in_guest(vm, guest.agent, script.replace("cat", f"{busybox} cat"))).split()
            score, cgroup, memory, weight, tasks, most = said
            assert (score, cgroup, weight) == ("-1000", "0::/../../../agent", str(cgroupfs.AGENT_WEIGHT))
            assert int(memory) == cgroupfs.AGENT_MEMORY
            assert int(tasks) == int(most) - cgroupfs.RESERVED_TASKS
            assert await run(box, "cat", "/proc/self/oom_score_adj") == b"0\n"
        finally:
            await box.remove()


#: As root in a container with its own cgroup mounted writable, as needed by systemd and container engines in one.
NEST = r"""
cd /sys/fs/cgroup || exit 3
echo 100000 2>/dev/null >cgroup.max.descendants && exit 5
name=$(printf '%0250d' 0); depth=0
while mkdir $name 2>/dev/null; do cd $name; depth=$((depth+1)); done
sleep 1000 & echo $! >cgroup.procs || exit 4
cd /sys/fs/cgroup; mkdir $(seq 1 3000) 2>/dev/null
echo $depth $(ls -d [1-9]* | wc -l)
"""


async def processes(agent: Agent, name: str) -> str:
    """Return the table of a container's processes: the agent aborts a walk that takes too long; retry."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            try:
                return str((await agent.guest.ListProcesses(caisson_pb2.ListProcessesRequest(container_id=name))).table)
            except AgentError as error:
                if "could not be inspected within" not in str(error):
                    raise


async def test_nested_cgroups_hide_nobody_and_can_be_removed(vm: Caisson) -> None:
    async with Guest(machine(vm)) as guest:
        await guest.agent.create_sandbox()
        spec = default_spec(vm.manifest("default")["containers"]["busybox"])
        options = ["rw", "nosuid", "nodev", "noexec"]
        spec.Mounts.add(destination="/sys/fs/cgroup", type="cgroup", source="cgroup", options=options)
        box = await guest.agent.create_container("nesting", spec)
        await box.start()
        try:
            process = await box.exec(["/bin/sh", "-c", NEST], env=["PATH=/bin"])
            said = b"".join([data async for data in process.stdout()])
            assert await process.wait() == 0, b"".join([data async for data in process.stderr()])
            depth, many = map(int, said.split())
            assert 15 < depth <= int(NESTING["cgroup.max.depth"])  # a shell can go as deep as paths are long
            assert many == int(NESTING["cgroup.max.descendants"]) - depth
            assert "sleep 1000" in await processes(guest.agent, "nesting")
            assert await run(box, "true") == b""
            await box.signal(9)
            assert await box.init().wait() == 137
        finally:
            await box.remove()

"""Kill nsexec's stages at each point at which they depend on each other, and at random moments.

A test build stops at a named point (agent/nsexec/faults.h), and is killed there from outside, or never continues.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.client import AgentError
from caisson.agent.libcontainer.cgroups import HierarchyV2
from caisson.agent.libcontainer.config.process import Process
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.process.fork_server import ForkServer
from caisson.agent.libcontainer.process.nsexec import Nsexec
from tests.native.agent_support import ROOT, RunningAgent
from tests.native.nsexec_support import Box, children, config, make_rootfs
from tests.support.poll import until

pytestmark = pytest.mark.root

POINTS = re.findall(r"^\tPOINT\((\w+)\)", (ROOT / "agent/nsexec/faults.h").read_text(), re.MULTILINE)
BEFORE_READY = POINTS[: POINTS.index("ready")]

#: Where a stage that never continues is tried: each costs the agent's timeout.
HANGS = ["entry", "stage1_reported", "stage0_maps", "stage2_cloned", "stage2_entry", "prepared"]

#: The name of a stage that has stopped at a fault (proc_pid_comm(5)).
FAULT_COMM = "nsexec:fault"

#: Seconds for a call to fail after its stage was killed; mostly an allowance for a busy machine.
MAX_FAILURE_SECONDS = 1.0


class FaultyNsexec(Nsexec):
    """A variant that is told where to stop: only a test build obeys, and only tests tell it."""

    point = ""

    def spawn(self, stdio: tuple[int, int, int] | None, passed: Iterable[int], env: Mapping[str, str]) -> int:
        return super().spawn(stdio, passed, {**env, "_CAISSON_FAULT": self.point})


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyNsexec]:
    build = tmp_path_factory.mktemp("faults")
    subprocess.run(["make", "-s", "-C", ROOT / "agent/nsexec", f"BUILD={build}", "FAULTS=1"], check=True)
    nsexec = FaultyNsexec.seal(build / "nsexec")
    assert isinstance(nsexec, FaultyNsexec)
    yield nsexec
    nsexec.close()


@pytest.fixture
async def fault_box(faulty: FaultyNsexec) -> AsyncIterator[Box]:
    """Provide a box with such an nsexec and a short timeout."""
    with tempfile.TemporaryDirectory(prefix="caisson-box-") as directory:
        path = Path(directory)
        path.chmod(0o755)
        box = Box(path, make_rootfs(path / "rootfs"), faulty, timeout=1.0)
        faulty.point = ""
        yield box
        faulty.point = ""
        await box.close()


def kinds() -> dict[str, dict[str, Any]]:
    """Return containers whose creation uses different stages."""
    ids = {name: [{"containerID": 0, "hostID": 100000, "size": 1000}] for name in ("uidMappings", "gidMappings")}
    user, ahead = config("true"), config("true")
    user["linux"] |= ids
    user["linux"]["namespaces"].append({"type": "user"})
    ahead["linux"]["timeOffsets"] = {"monotonic": {"secs": 100, "nanosecs": 0}}
    ahead["linux"]["namespaces"].append({"type": "time"})
    return {
        "plain": config("true"),
        "user namespace": user,
        "time offsets": ahead,
        "terminal": config("true", terminal=True),
    }


def stopped_children(parent: int) -> list[int]:
    """Return children that have reached their point, without those killed there and not yet reaped."""
    found = []
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            _, name, state = re.split(r" \(|\) ", Path(f"/proc/{pid}/stat").read_text(), maxsplit=2)
            if name == FAULT_COMM and not state.startswith("Z"):
                found.append(int(pid))
        except OSError:
            continue
    return found


async def interrupted(call: asyncio.Task[Any], *, kill: bool) -> bool:
    """Wait until a stage stops, or the call finishes without; kill only that stage."""
    while not call.done():
        for pid in stopped_children(os.getpid()):
            if kill:
                os.kill(pid, signal.SIGKILL)
            return True
        await asyncio.sleep(0.001)
    return False


def left(box: Box) -> list[str]:
    """Return what a failed call must not leave."""
    found = [path.name for path in box.path.iterdir() if path.name == "exec.fifo"]
    if str(box.path) in Path("/proc/self/mountinfo").read_text():
        found.append("a mount")
    return found


async def fails_cleanly(box: Box, call: asyncio.Task[Any], *, kill: bool) -> bool:
    """Return whether the point was reached; then the call must have failed in time, with a reason, and left nothing."""
    if not await interrupted(call, kill=kill):
        return False
    began = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        await call
    assert time.monotonic() - began < MAX_FAILURE_SECONDS + (0 if kill else 1.5)
    assert re.search("killed|gone|ended|broke off|longer than|could not|died", str(caught.value)), caught.value
    assert left(box) == []
    return True


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "hangs"])
@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("by", ["spawn", "fork server"])
async def test_create(fault_box: Box, faulty: FaultyNsexec, by: str, kind: str, kill: bool) -> None:
    met = set()
    server = ForkServer(faulty, fault_box.reaper) if by == "fork server" else None
    fault_box.launcher.starter.server = server

    def stop_at(point: str) -> None:
        faulty.point = point
        if server is not None:
            server.close()  # the next one is told

    for point in BEFORE_READY if kill else HANGS:
        stop_at(point)
        call = asyncio.ensure_future(fault_box.create(kinds()[kind]))
        if await fails_cleanly(fault_box, call, kill=kill):
            met.add(point)
        else:
            await end(fault_box, await call)
    stop_at("")
    await end(fault_box, await fault_box.create(kinds()[kind]))  # the next one works
    if server is not None:
        server.close()
        await until(lambda: server.pid not in children(), "it has exited")
    with_stage_one = {point for point in POINTS if point.startswith("stage1") or point == "stage0_maps"}
    wanted = set(BEFORE_READY if kill else HANGS)
    if kind in ("plain", "terminal"):
        wanted -= with_stage_one
    elif kind == "time offsets":
        wanted -= {"stage1_unmapped", "stage1_mapped"}
    else:
        wanted -= {"stage1_offsets"}
    if server is not None and kind in ("plain", "terminal"):  # it clones stage 2 itself
        wanted -= {point for point in POINTS if point.startswith("stage2")}
    else:
        wanted -= {"server_cloned"}
    assert met == wanted


async def on_a_terminal(box: Box, init: Any, value: dict[str, Any]) -> int:
    """Return the status of a process on its own terminal."""
    process = Process.from_json({"args": ["true"], "cwd": "/", "env": ["PATH=/bin"], "terminal": True})
    launched = await box.launch_exec(process, init, Spec.from_json(value), None)
    assert launched.console is not None
    try:
        return await launched.child.wait()
    finally:
        os.close(launched.console)


async def end(box: Box, launched: Any) -> None:
    """Let a created container run to completion."""
    await box.start(launched)
    assert await launched.child.wait() == 0


@pytest.mark.parametrize("point", ["ready", "executing"])
async def test_start(fault_box: Box, faulty: FaultyNsexec, point: str) -> None:
    """A process killed before its program is executed was not started."""

    faulty.point = point
    launched = await fault_box.create(config("true"))
    call = asyncio.ensure_future(fault_box.start(launched))
    assert await interrupted(call, kill=True)
    began = time.monotonic()
    with pytest.raises(LaunchError, match=r"died before (it was started|its program was executed)"):
        await call
    assert await launched.child.wait() == 137
    assert time.monotonic() - began < MAX_FAILURE_SECONDS
    fault_box.fifo.unlink(missing_ok=True)
    faulty.point = ""
    await end(fault_box, await fault_box.create(config("true")))


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "hangs"])
@pytest.mark.parametrize("kind", ["plain", "user namespace", "terminal"])
@pytest.mark.parametrize("by", ["spawn", "fork server"])
def test_exec(fault_box: Box, faulty: FaultyNsexec, by: str, kind: str, kill: bool) -> None:
    met = set()
    server = ForkServer(faulty, fault_box.reaper) if by == "fork server" else None
    fault_box.launcher.starter.server = server

    async def work() -> None:
        faulty.point = ""
        value = kinds()[kind]
        value["process"] |= {"args": ["sleep", "1000"], "terminal": False}
        init = await fault_box.running(value)
        process: dict[str, Any] = {"args": ["true"]}

        async def run() -> int:
            if kind != "terminal":
                return (await fault_box.exec(init, process, value))[0]
            return await on_a_terminal(fault_box, init, value)

        def stop_at(point: str) -> None:
            faulty.point = point
            if server is not None:
                server.close()  # the next one is told

        for point in POINTS if kill else HANGS:
            stop_at(point)
            call = asyncio.ensure_future(run())
            if await interrupted(call, kill=kill):
                met.add(point)
                if point == "executing" and kill:  # as far as anybody can tell, it has run
                    assert await call == 137
                    continue
                with pytest.raises(LaunchError):
                    await asyncio.wait_for(call, MAX_FAILURE_SECONDS + 1.5)
            else:
                assert await call == 0, point
        stop_at("")
        assert await run() == 0
        stop_at("")
        assert init.child.pid in map(
            int, Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        )  # the container is unchanged

    fault_box.run(work())
    assert {"entry", "stage2_cloned", "stage2_entry", "prepared"} <= met
    assert ("server_cloned" in met) == (by == "fork server" and kill)


class ChangingCgroup:
    """A cgroup that no process can enter before `allow`: another one in its parent is threaded (cgroup-v2.rst)."""

    def __init__(self) -> None:
        hierarchy = HierarchyV2.find()
        assert hierarchy is not None
        self.parent = Path(tempfile.mkdtemp(prefix="caisson-test-", dir=hierarchy.root))
        (self.parent / "it").mkdir()
        (self.parent / "threaded").mkdir()
        (self.parent / "threaded/cgroup.type").write_text("threaded")

    @contextlib.contextmanager
    def join_fds(self) -> Iterator[dict[str, int]]:
        fd = os.open(self.parent / "it", os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield {"_CAISSON_CGROUP": fd}
        finally:
            os.close(fd)

    def allow(self) -> None:
        (self.parent / "threaded").rmdir()

    def close(self) -> None:
        for path in (*self.parent.glob("*/"), self.parent):
            path.rmdir()


async def test_an_exec_that_cannot_enter_its_cgroup_never_runs(fault_box: Box, faulty: FaultyNsexec) -> None:
    """Not even if a moment later it could, as after a process of a container at its limit has exited."""
    server = fault_box.launcher.starter.server = ForkServer(faulty, fault_box.reaper)
    init = await fault_box.running()
    cgroup = ChangingCgroup()
    faulty.point = "entry"
    call = asyncio.ensure_future(fault_box.exec(init, {"args": ["touch", "/tmp/ran"]}, cgroup=cgroup))
    if await interrupted(call, kill=False):
        cgroup.allow()
        for pid in stopped_children(os.getpid()):
            os.kill(pid, signal.SIGUSR1)
    with pytest.raises(LaunchError, match="clone into cgroup"):
        await call
    server.close()
    await until(lambda: set(stopped_children(os.getpid())) == set(), "all have exited")
    cgroup.close()
    assert not (fault_box.rootfs / "tmp/ran").exists()


def test_the_program_that_is_shipped_has_no_such_points(nsexec_path: Path) -> None:
    program = nsexec_path.read_bytes()
    assert b"_CAISSON_FAULT" not in program
    assert FAULT_COMM.encode() not in program


@pytest.mark.timeout(200)
async def test_stages_killed_at_any_moment(agent: RunningAgent) -> None:
    """From outside and at random, as by the kernel's OOM killer."""
    chance = random.Random(11)

    def kill_one() -> int:
        stages = []
        for pid in agent.all_children():
            try:
                if Path(f"/proc/{pid}/comm").read_text().startswith("nsexec"):
                    stages.append(pid)
            except OSError:
                continue
        for pid in chance.sample(stages, min(1, len(stages))):
            try:
                os.kill(pid, signal.SIGKILL)
                return 1
            except ProcessLookupError:
                pass
        return 0

    async with agent.connect() as client:
        await client.create_sandbox()
        base = await client.ensure_container("base", agent.spec("/bin/sh", "-c", "while :; do sleep 1000; done"))
        await client.version()
        fds, killed, failed = agent.fds(), 0, 0

        async def one(number: int) -> None:
            nonlocal failed
            try:
                if number % 2:
                    await (await base.exec(["/bin/true"])).wait()
                else:
                    container = await client.create_container("again", agent.spec("/bin/true"))
                    try:
                        await container.start()
                    finally:
                        await container.remove()
            except AgentError as error:
                failed += 1
                assert "bug" not in error.details and "Error:" not in error.details, error.details

        for number in range(200):
            call = asyncio.ensure_future(one(number))
            await asyncio.sleep(chance.random() * 0.006)
            killed += kill_one()
            await asyncio.wait_for(call, 20)
        assert killed > 20 and failed > 10, (killed, failed)
        assert await (await base.exec(["/bin/true"])).wait() == 0  # by a new fork server, if the last one was killed
        await until(lambda: len(agent.children()) == 1 and agent.fds() <= fds, "nothing is left")
        assert sorted(path.name for path in (agent.state / "sandbox").iterdir()) == [".namespaces", "base"]

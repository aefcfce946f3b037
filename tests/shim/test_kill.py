"""Kill the shim, the guest and the VM's processes at random moments: nothing is left, and the next container runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.rpc.ttrpc.responses import RpcError
from caisson.agent.shim.bundle import ProcessId
from tests.shim.engine import RUNTIME, Engine, children
from tests.shim.fake_containerd import FakeContainerd, Task
from tests.shim.native_machines import agent_of
from tests.support.poll import until, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

#: Seconds in which a container is created, started, and has run a process on a quiet machine.
LIFE = 1.5

#: Seconds in which creation has started, even on a fast one.
CREATION = 0.4

#: Seconds in which every pending call fails once the VM or the shim is dead.
FAILURE_TIMEOUT = 10.0


#: Ways to end the shim.
SHIM_SIGNALS = {"shim": signal.SIGKILL, "shim that cleans up": signal.SIGTERM}


async def live(task: Task) -> None:
    """Create a container, start it, and run processes in it until something fails."""
    with contextlib.suppress(RpcError):
        await task.create()
        await task.call("Start")
        for number in range(100):
            await task.exec(f"e{number}", "true")
            await task.call("Wait", exec_id=f"e{number}")
            await task.call("Delete", exec_id=f"e{number}")


async def kill(fake: FakeContainerd, victim: str, shim: int) -> None:
    """Kill the shim, or shut it down; or kill the guest, as soon as there is one."""
    if victim in SHIM_SIGNALS:
        os.kill(shim, SHIM_SIGNALS[victim])
        return
    await asyncio.to_thread(wait_until, lambda: any(guests(fake)), "the guest's start")
    for place in guests(fake):
        os.kill(agent_of(place).pid, signal.SIGTERM)


def guests(fake: FakeContainerd) -> list[Path]:
    """Return the directories of the running agents."""
    return [path.parent for path in fake.place.glob("agents/*/pid") if path.stat().st_size]


def nothing_left(fake: FakeContainerd) -> bool:
    """Return whether no agent, directory or mount of a pod is left."""
    left = [*fake.place.glob("agents/*/pid"), *fake.place.glob("run-pods/*")]
    return not left and str(fake.place) not in Path("/proc/self/mountinfo").read_text()


def alive(pid: int) -> bool:
    try:
        return ProcessId.of(pid).alive
    except OSError:
        return False


async def run_and_kill(fake: FakeContainerd, name: str, victim: str, moment: float) -> None:
    task = await fake.start(name, "sleep", "1000")
    shim = (await task.call("Connect")).shim_pid
    living = asyncio.ensure_future(live(task))
    await asyncio.wait([living], timeout=moment)
    await kill(fake, victim, shim)
    await asyncio.wait([living], timeout=FAILURE_TIMEOUT)
    assert living.done(), "calls must fail with the VM, and not wait for it"
    if victim == "guest":
        # Like containerd, which deletes a task after its exit event.
        for method, fields in (("Wait", {}), ("Kill", {"signal": 9}), ("Delete", {}), ("Shutdown", {})):
            with contextlib.suppress(RpcError):
                await task.call(method, **fields)
    if victim == "shim that cleans up":
        await until(lambda: not alive(shim), "the shim's end")
        assert nothing_left(fake), "something is left for containerd to do"
    await fake.delete_program(task)
    Path(task.address.removeprefix("unix://")).unlink(missing_ok=True)


async def check_rounds(fake: FakeContainerd, seed: int, rounds: int) -> None:
    chance = random.Random(seed)
    for number in range(rounds):
        victim, moment = chance.choice([*SHIM_SIGNALS, "guest"]), chance.uniform(0, LIFE)
        await run_and_kill(fake, f"k{number}", victim, moment)
        assert nothing_left(fake), (seed, number, victim, moment)
    task = await fake.run("after", "true")
    assert (await task.call("Wait")).exit_status == 0
    await task.call("Delete")
    await task.call("Shutdown")


async def test_nothing_is_left_after_a_kill_at_a_random_moment(fake: FakeContainerd) -> None:
    await check_rounds(fake, seed=19, rounds=6)


async def test_a_shim_that_ends_while_it_creates_a_container_leaves_nothing(fake: FakeContainerd) -> None:
    chance = random.Random(20)
    for number in range(3):
        await run_and_kill(fake, f"k{number}", "shim that cleans up", chance.uniform(0, CREATION))


@pytest.mark.parametrize("moment", [0.02, 0.1, 0.2, 0.3, 0.4, 0.6])
async def test_a_client_that_gives_up_while_its_container_is_created_leaves_nothing(
    fake: FakeContainerd, moment: float
) -> None:
    task = await fake.start("c", "sleep", "1000")
    shim = (await task.call("Connect")).shim_pid
    creating = asyncio.ensure_future(task.create())
    await asyncio.wait([creating], timeout=moment)
    # As containerd does when its client, such as dockerd, has gone.
    with contextlib.suppress(RpcError):
        await task.call("Delete")
    await task.call("Shutdown")
    await task.disconnect()
    await asyncio.gather(creating, return_exceptions=True)
    await until(lambda: not alive(shim), "the shim's end")
    assert nothing_left(fake), moment


@pytest.mark.nightly
@pytest.mark.timeout(1800)
async def test_nothing_is_left_after_fifty_kills(fake: FakeContainerd) -> None:
    await check_rounds(fake, seed=random.randrange(1 << 30), rounds=50)


#: The processes between `docker` and a container.  Those that serve every pod are restarted.
CHAIN = ("dockerd", "containerd", "shim", "supervisor", "virtiofsd", "vsock", "qemu")

#: A container that is removed when it exits.
RUN = ("run", "--rm", "--network", "none", "--runtime", RUNTIME, "busybox")

#: Seconds in which `docker run` has started a container, even on a busy machine.
DOCKER_RUN = 4.0


def kill_in_chain(docker: Engine, victim: str) -> None:
    """Kill one process in the chain of every pod that exists by now."""
    if victim == "dockerd":
        docker.kill_dockerd()
    elif victim == "containerd":
        docker.kill_containerd()
    else:
        for path in docker.place.glob("state/io.containerd.runtime.v2.task/*/*/caisson.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):  # not that far yet, or already gone
                for pid in pids_of_pod(docker, json.loads(path.read_text()), victim):
                    os.kill(pid, signal.SIGKILL)


def pids_of_pod(docker: Engine, record: dict[str, Any], victim: str) -> list[int]:
    """Return the pids of a process in a pod's chain.  ``record`` is the shim's, in the bundle."""
    if victim == "shim":
        return [record["shim"]["pid"]]
    pids: dict[str, int] = json.loads((docker.run / record["machine"] / "vm.json").read_text())["pids"]
    return children(pids["supervisor"], "virtiofsd") if victim == "virtiofsd" else [pids[victim]]


#: What docker says while it has no containerd, to which it reconnects at growing intervals; a kill is lost then.
UNCONNECTED = (b"connection refused", b"error reading server preface", b"did not receive an exit event")


def once_connected(docker: Engine, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Run a docker command; again while dockerd has no containerd."""
    while True:
        done = docker.docker(*words)
        if not any(text in done.stderr for text in UNCONNECTED):
            return done
        time.sleep(0.5)


async def kill_at(docker: Engine, name: str, victim: str, moment: float) -> bytes:
    """Start a container, kill something, and remove the container; return what docker says about both."""
    words = ("run", "--detach", "--name", name, "--network", "none", "--runtime", RUNTIME, "busybox", "sleep", "1000")
    running = asyncio.create_task(asyncio.to_thread(docker.docker, *words))
    await asyncio.wait([running], timeout=moment)
    await asyncio.to_thread(kill_in_chain, docker, victim)
    started = await running
    removed = await asyncio.to_thread(once_connected, docker, "rm", "--force", name)
    if victim in ("dockerd", "containerd"):  # docker forgets a task whose start it has not seen, as with runc
        await asyncio.to_thread(docker.delete_tasks)
    return started.stderr + removed.stderr


@pytest.mark.vm
@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("victim", CHAIN)
async def test_nothing_of_a_vm_is_left_after_fifty_kills(docker: Engine, victim: str) -> None:
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    for number in range(50):
        moment = chance.uniform(0, DOCKER_RUN)
        said = await kill_at(docker, f"{victim}{number}", victim, moment)
        found = (seed, number, victim, moment, said)
        await asyncio.to_thread(wait_until, lambda: docker.vms() == [] and docker.mounts() == [], f"the end: {found}")
        done = await asyncio.to_thread(once_connected, docker, *RUN, "echo", "runs")
        assert done.stdout == b"runs\n", (found, done.stderr)

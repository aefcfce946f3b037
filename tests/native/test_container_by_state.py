"""A container is what its directory, its cgroup and /proc say: one process creates it, others do everything else.

Every command is a process of its own; each is killed at every point at which nsexec can be stopped, and at others.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.native.agent_support import ROOT
from tests.native.oci_support import Oci, become_subreaper, bundle, reaping

pytestmark = pytest.mark.root
NAME = f"state-{os.getpid()}"
POINTS = re.findall(r"^\tPOINT\((\w+)\)", (ROOT / "agent/nsexec/faults.h").read_text(), re.MULTILINE)
STANDS_STILL = "nsexec:fault"
PACKAGES = ROOT / ".venv" / "src"
KILLS = 50
SECONDS = 20


@pytest.fixture(scope="module")
def faulty_nsexec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("faults")
    subprocess.run(["make", "-s", "-C", ROOT / "agent/nsexec", f"BUILD={build}", "FAULTS=1"], check=True)
    return build / "nsexec"


class Driver(Oci):
    """The command line without a shell before it, so that its pid is known."""

    def argv(self, *args: str) -> list[str]:
        driver = ROOT / "tests" / "native" / "oci_driver.py"
        return [sys.executable, "-I", "-S", str(driver), str(PACKAGES), "--root", str(self.root), *args]

    def begin(self, *args: str, point: str = "") -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.argv(*args), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**self._env, "_CAISSON_FAULT": point},
        )  # fmt: skip


@pytest.fixture
def oci(tmp_path: Path, faulty_nsexec: Path) -> Iterator[Driver]:
    become_subreaper()
    runtime = Driver(faulty_nsexec, tmp_path / "root", faulty_nsexec)
    runtime.root.mkdir()
    with reaping():
        yield runtime
        runtime.clear()


@pytest.fixture
def sleeper(tmp_path: Path, busybox_rootfs: Path) -> Path:
    return bundle(tmp_path / "sleeper", busybox_rootfs, "sleep", "1000")


def stands_still(parent: int) -> bool:
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return any(Path(f"/proc/{pid}/comm").read_text().strip() == STANDS_STILL for pid in children)
    except OSError:
        return False


def kill_at_point(command: subprocess.Popen[bytes]) -> bool:
    """Kill a command when its nsexec stands still; False if it came to its end without."""
    deadline = time.monotonic() + SECONDS
    while command.poll() is None:
        if stands_still(command.pid):
            command.kill()
            command.wait()
            return True
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return False


def nothing_is_left(oci: Driver) -> None:
    """No process, no cgroup, no directory."""
    assert list(oci.root.iterdir()) == []
    deadline = time.monotonic() + SECONDS
    while True:
        left = [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/{NAME}*")]
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if not left and not children:
            return
        assert time.monotonic() < deadline, (left, children)
        time.sleep(0.01)


def test_each_command_is_a_process_of_its_own(oci: Driver, sleeper: Path) -> None:
    assert oci.detached("create", "-b", str(sleeper), NAME).status == 0
    assert oci.status(NAME) == "created"
    oci.ok("start", NAME)
    assert oci.ok("exec", NAME, "echo", "in") == "in\n"
    oci.ok("pause", NAME)
    oci.ok("update", "--pids-limit", "33", NAME)
    assert oci.status(NAME) == "paused"
    oci.ok("resume", NAME)
    oci.ok("kill", NAME, "KILL")
    while oci.status(NAME) != "stopped":
        pass
    oci.ok("delete", NAME)
    nothing_is_left(oci)


@pytest.mark.parametrize("point", POINTS)
def test_create_that_is_killed(oci: Driver, sleeper: Path, point: str) -> None:
    kill_at_point(oci.begin("create", "-b", str(sleeper), NAME, point=point))
    oci.ok("delete", "--force", NAME)
    nothing_is_left(oci)
    oci.running(sleeper, NAME)  # the id is free


@pytest.mark.parametrize("point", POINTS)
def test_exec_that_is_killed(oci: Driver, sleeper: Path, point: str) -> None:
    oci.running(sleeper, NAME)
    kill_at_point(oci.begin("exec", NAME, "true", point=point))
    assert oci.ok("exec", NAME, "echo", "still") == "still\n"
    oci.ok("delete", "--force", NAME)
    nothing_is_left(oci)


def test_start_that_is_killed(oci: Driver, sleeper: Path) -> None:
    created = oci.begin("create", "-b", str(sleeper), NAME, point="executing")
    assert created.wait() == 0
    start = oci.begin("start", NAME)
    deadline = time.monotonic() + SECONDS
    pid = int(oci.state(NAME)["pid"])
    while Path(f"/proc/{pid}/comm").read_text().strip() != STANDS_STILL:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    start.kill()
    start.wait()
    oci.ok("delete", "--force", NAME)
    nothing_is_left(oci)


def test_commands_killed_at_random(oci: Driver, sleeper: Path) -> None:
    """Seeded: create, start, exec and delete, each killed after some of the time that it takes."""
    rng = random.Random(20261127)
    for _ in range(KILLS):
        commands = [
            ("create", "-b", str(sleeper), NAME),
            ("start", NAME),
            ("exec", NAME, "true"),
            ("delete", "-f", NAME),
        ]
        doomed = rng.randrange(len(commands))
        for command in commands[:doomed]:
            oci.begin(*command).wait()
        victim = oci.begin(*commands[doomed])
        time.sleep(rng.uniform(0.005, 0.12))  # what is tried is this moment
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        assert oci("delete", "--force", NAME).status == 0
        nothing_is_left(oci)


def test_two_creates_of_one_id(oci: Driver, sleeper: Path) -> None:
    for _ in range(5):
        both = [oci.begin("create", "-b", str(sleeper), NAME) for _ in range(2)]
        assert sorted(command.wait() for command in both) == [0, 1]
        assert oci.status(NAME) == "created"
        both = [oci.begin("start", NAME) for _ in range(2)]
        assert sorted(command.wait() for command in both) == [0, 1]
        assert oci.status(NAME) == "running"
        both = [oci.begin("delete", "-f", NAME) for _ in range(2)]
        assert [command.wait() for command in both] == [0, 0]
        nothing_is_left(oci)


def test_many_containers_at_once(oci: Driver, sleeper: Path) -> None:
    names = [f"{NAME}-{number}" for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda name: oci.begin("create", "-b", str(sleeper), name).wait(), names))
        assert results == [0] * len(names)
        assert oci.ok("list", "-q").split() == sorted(names)
        assert {one["status"] for one in json.loads(oci.ok("list", "-f", "json"))} == {"created"}
        assert list(pool.map(lambda name: oci.begin("delete", name).wait(), names)) == [0] * len(names)
    nothing_is_left(oci)

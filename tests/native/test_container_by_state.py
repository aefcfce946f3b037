"""Test that a container is fully described by its directory, cgroup and /proc: one process creates it, others do the
rest.

Every command is a separate process, the interpreter alone or preceded by the front; each is killed at every point at
which it or its nsexec can be stopped, and at others.
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
from tests.native.oci_support import Oci, become_subreaper, reaping

pytestmark = pytest.mark.root
NAME = f"state-{os.getpid()}"
POINTS = re.findall(r"^\tPOINT\((\w+)\)", (ROOT / "agent/nsexec/faults.h").read_text(), re.MULTILINE)
STOPPED = "nsexec:fault"
PACKAGES = ROOT / ".venv" / "src"
DRIVER = ROOT / "tests" / "native" / "oci_driver.py"
KILLS = 50
SECONDS = 20
#: The commands that lead to a state in which a command can be tried.
LIFE = {
    "create": (),
    "start": ("create",),
    "exec": ("create", "start"),
    "pause": ("create", "start"),
    "resume": ("create", "start", "pause"),
    "update": ("create", "start"),
    "kill": ("create", "start"),
    "delete": ("create", "start"),
}


def points(directory: str, pattern: str) -> list[str]:
    """Return the points at which programs in a directory can be killed."""
    sources = sorted((ROOT / directory).rglob("*.[cp]*"))
    found = (re.findall(pattern, path.read_text()) for path in sources if path.suffix in (".py", ".c"))
    return sorted({name for names in found for name in names})


OF_COMMANDS = points("agent/libcontainer", r'faults\.reach\("(\w+)"\)') + points(
    "agent/runtime", r'faults\.reach\("(\w+)"\)'
)
OF_FRONT = points("agent/nsexec/front", r"FAULT\((\w+_\w+)\)")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a directory with an nsexec and a front that can be stopped."""
    build = tmp_path_factory.mktemp("faults")
    command = ["make", "-s", "-C", str(ROOT / "agent/nsexec"), f"BUILD={build}", "FAULTS=1", "nsexec", "front"]
    subprocess.run(command, check=True)
    return build


class Driver(Oci):
    """The command line without a shell in front, so that its pid is known; `front` is the front, if any."""

    front: Path | None = None

    def argv(self, *args: str) -> list[str]:
        script = f"import runpy, sys; sys.argv.pop(0); runpy.run_path({str(DRIVER)!r}, run_name='__main__')"
        python = [sys.executable, "-I", "-S", "-c", script, "caisson-oci", str(PACKAGES), "--root", str(self.root)]
        return [*([str(self.front)] if self.front else []), *python, *args]

    def begin(self, *args: str, point: str = "") -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.argv(*args), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**self._env, "_CAISSON_FAULT": point},
        )  # fmt: skip

    def lead_to(self, command: str, made: Path) -> None:
        """Run what precedes a command in a container's life."""
        for name in LIFE[command]:
            assert self.begin(*words(name, made)).wait() == 0, name


def words(command: str, made: Path) -> list[str]:
    """Return the command's arguments for the container."""
    more = {
        "create": ["-b", str(made), NAME],
        "exec": [NAME, "true"],
        "update": ["--pids-limit", "33", NAME],
        "kill": [NAME, "KILL"],
        "delete": ["--force", NAME],
    }
    return [command, *more.get(command, [NAME])]


@pytest.fixture(params=["python", "front"])
def oci(request: pytest.FixtureRequest, tmp_path: Path, faulty: Path) -> Iterator[Driver]:
    become_subreaper()
    runtime = Driver(faulty, tmp_path / "root", faulty / "nsexec")
    runtime.front = faulty / "caisson-oci" if request.param == "front" else None
    runtime.root.mkdir()
    with reaping():
        yield runtime
        runtime.clear()


def stands_still(parent: int) -> bool:
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return any(Path(f"/proc/{pid}/comm").read_text().strip() == STOPPED for pid in children)
    except OSError:
        return False


def kill_at_point(command: subprocess.Popen[bytes]) -> bool:
    """Kill a command when its nsexec stops; return False if it finished without stopping."""
    deadline = time.monotonic() + SECONDS
    while command.poll() is None:
        if stands_still(command.pid):
            command.kill()
            command.wait()
            return True
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return False


def cgroups_left() -> list[str]:
    """Return our containers' cgroups, which are below this process's own."""
    left: list[str] = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        place = Path("/sys/fs/cgroup", names.removeprefix("name=") or "unified", path.lstrip("/"))
        left += [str(found) for found in place.glob(f"{NAME}*")]
    return left


def nothing_is_left(oci: Driver) -> None:
    """Check that no process, cgroup or directory is left."""
    assert list(oci.root.iterdir()) == []
    deadline = time.monotonic() + SECONDS
    while True:
        left = cgroups_left()
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if not left and not children:
            return
        assert time.monotonic() < deadline, (left, children)
        time.sleep(0.01)


def test_each_command_is_a_process_of_its_own(oci: Driver, sleeper: Path) -> None:
    assert oci.detached("create", "-b", str(sleeper), NAME).status == 0
    assert oci.status(NAME) == "created"
    oci.ok("start", NAME)
    for _ in range(2):
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


@pytest.mark.parametrize("oci", ["python"], indirect=True)
@pytest.mark.parametrize("point", POINTS)
def test_create_that_is_killed(oci: Driver, sleeper: Path, point: str) -> None:
    kill_at_point(oci.begin("create", "-b", str(sleeper), NAME, point=point))
    oci.ok("delete", "--force", NAME)
    nothing_is_left(oci)
    oci.running(sleeper, NAME)  # the id is free


@pytest.mark.parametrize("point", POINTS)
def test_exec_that_is_killed(oci: Driver, sleeper: Path, point: str) -> None:
    oci.running(sleeper, NAME)
    assert oci.ok("exec", NAME, "echo", "before") == "before\n"
    kill_at_point(oci.begin("exec", NAME, "true", point=point))
    assert oci.ok("exec", NAME, "echo", "still") == "still\n"
    oci.ok("delete", "--force", NAME)
    nothing_is_left(oci)


def commands_at(point: str) -> Iterator[str]:
    """Return the commands that pass a point, which starts with the name of one; all of them write the state."""
    if point == "state_written":
        yield from ("create", "update")
    else:
        yield point.partition("_")[0]


@pytest.mark.parametrize(
    ("oci", "command", "point"),
    [("python", command, point) for point in OF_COMMANDS for command in commands_at(point)]
    + [("front", command, point) for point in OF_FRONT for command in commands_at(point)],
    indirect=["oci"],
)
def test_command_killed_where_it_changes_the_state(oci: Driver, sleeper: Path, command: str, point: str) -> None:
    oci.lead_to(command, sleeper)
    argv = words(command, sleeper)
    if point == "kill_frozen":  # all are signalled
        argv = ["kill", "--all", NAME, "CONT"]
    if oci.front is not None and command == "delete":  # it deletes what has ended
        oci.ok("kill", NAME, "KILL")
        while oci.status(NAME) != "stopped":
            pass
    assert oci.begin(*argv, point=point).wait() == -signal.SIGKILL
    known = oci("state", NAME)
    assert known.message == "container does not exist" or json.loads(known.out)["status"] in (
        "created", "running", "paused", "stopped"
    )  # fmt: skip
    if command in ("pause", "update", "resume"):  # repeated by another command, it is as if it had never happened
        if oci.status(NAME) != {"pause": "paused", "resume": "running"}.get(command):
            oci.ok(*argv)
        assert oci.status(NAME) == ("paused" if command == "pause" else "running")
    oci.ok("delete", "--force", NAME)
    nothing_is_left(oci)
    assert oci.begin(*words("create", sleeper)).wait() == 0  # the id is free


def test_points_are_found() -> None:
    assert {point.partition("_")[0] for point in OF_COMMANDS} == {*LIFE, "state"} - {"exec"}
    assert {point.partition("_")[0] for point in OF_FRONT} == {"start", "kill", "delete"}


def test_start_that_is_killed(oci: Driver, sleeper: Path) -> None:
    created = oci.begin("create", "-b", str(sleeper), NAME, point="executing")
    assert created.wait() == 0
    start = oci.begin("start", NAME)
    deadline = time.monotonic() + SECONDS
    pid = int(oci.state(NAME)["pid"])
    while Path(f"/proc/{pid}/comm").read_text().strip() != STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    start.kill()
    start.wait()
    oci.ok("delete", "--force", NAME)
    nothing_is_left(oci)


@pytest.mark.parametrize("oci", ["python"], indirect=True)
def test_commands_killed_at_random(oci: Driver, sleeper: Path, faulty: Path) -> None:
    """Seeded: create, start, exec and delete, each killed after a random part of its duration."""
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
        oci.front = rng.choice([None, faulty / "caisson-oci"])
        victim = oci.begin(*commands[doomed])
        longest = 0.12 if oci.front is None or doomed == 0 else 0.02
        time.sleep(rng.uniform(0.0005, longest))  # the moment is what is tested
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        oci.front = None
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


def test_two_commands_at_once(oci: Driver, sleeper: Path) -> None:
    """Seeded: whatever two commands do to one container at once, a third finds a consistent one."""
    rng = random.Random(17)
    for _ in range(12):
        oci.lead_to("exec", sleeper)
        both = [words(name, sleeper) for name in rng.choices(list(LIFE), k=2)]
        started = [oci.begin(*argv) for argv in both]
        for command, argv in zip(started, both, strict=True):
            if argv[0] == "exec" and not command.poll():
                oci("resume", NAME)  # it waits in a container that has been paused meanwhile
            assert command.wait(SECONDS) in (0, 1, 137, 255), both
        state = oci("state", NAME)
        assert state.message == "container does not exist" or json.loads(state.out)["id"] == NAME, both
        oci.ok("delete", "--force", NAME)
        nothing_is_left(oci)


@pytest.mark.parametrize("oci", ["front"], indirect=True)
@pytest.mark.parametrize(
    ("count", "at_once"), [(40, 4), pytest.param(500, 20, marks=[pytest.mark.nightly, pytest.mark.timeout(600)])]
)
def test_many_containers_at_once(oci: Driver, sleeper: Path, count: int, at_once: int) -> None:
    names = [f"{NAME}-{number}" for number in range(count)]
    with ThreadPoolExecutor(at_once) as pool:
        results = list(pool.map(lambda name: oci.begin("create", "-b", str(sleeper), name).wait(), names))
        assert results == [0] * len(names)
        assert oci.ok("list", "-q").split() == sorted(names)
        assert {one["status"] for one in json.loads(oci.ok("list", "-f", "json"))} == {"created"}
        assert list(pool.map(lambda name: oci.begin("delete", name).wait(), names)) == [0] * len(names)
    nothing_is_left(oci)

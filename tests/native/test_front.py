"""Test the front of the OCI command line: what it does itself, what it hands over, and that results do not differ.

Source: agent/nsexec/front, runtime/prepared.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.oci_support import OURS, Oci, Result, become_subreaper, bundle, edit, reaping
from tests.support.descriptors import watch_opens

pytestmark = pytest.mark.root
NAME = f"front-{os.getpid()}"
#: The commands that lead to a state.
STATES = {
    "missing": (),
    "created": ("create",),
    "running": ("create", "start"),
    "paused": ("create", "start", "pause"),
    "stopped": ("create", "start", "end"),
}
#: The commands to try in it.
COMMANDS = {
    "missing": [
        ["state", NAME], ["state", "a/b"], ["--log-format", "json", "state", NAME],
        ["--log-format", "x", "state", NAME], ["kill", NAME, "KILL"], ["start", NAME], ["delete", NAME],
        ["delete", "-f", NAME], ["exec", NAME, "true"],
    ],
    "created": [["state", NAME], ["start", NAME], ["exec", NAME, "true"], ["kill", NAME, "KILL"], ["delete", NAME]],
    "running": [
        ["state", NAME], ["state", NAME, "x"], ["kill", NAME, "sigusr1"], ["kill", NAME, "RTMIN+1"],
        ["kill", NAME, "XX"], ["kill", NAME, "KILL"], ["kill", "--all", NAME, "KILL"], ["start", NAME],
        ["delete", NAME, "--force"], ["exec", NAME, "nothere"], ["exec", NAME, "/etc/passwd"],
        ["exec", NAME], ["exec", NAME, "sh", "-c", "echo $HOME $PATH; id; pwd; echo err >&2; exit 3"],
        ["exec", "-e", "A=b", NAME, "env"],
    ],
    "paused": [["state", NAME], ["kill", NAME, "KILL"], ["start", NAME], ["delete", NAME], ["exec", NAME, "true"]],
    "stopped": [["state", NAME], ["kill", NAME, "0"], ["start", NAME], ["delete", NAME], ["exec", NAME, "true"]],
}  # fmt: skip


class Pair:
    """The interpreter alone, and with the front; each has its own root, and they take turns."""

    def __init__(self, directory: Path, nsexec: Path, front: Path) -> None:
        self.python = Oci(OURS, directory / "python", nsexec)
        self.front = Oci(OURS, directory / "front", nsexec, front)

    def __iter__(self) -> Iterator[Oci]:
        yield self.python
        yield self.front


@pytest.fixture
def pair(tmp_path: Path, nsexec_path: Path, front_path: Path) -> Iterator[Pair]:
    become_subreaper()
    both = Pair(tmp_path, nsexec_path, front_path)
    with reaping():
        yield both
        for oci in both:
            oci.clear()


@pytest.fixture
def oci(pair: Pair) -> Oci:
    """Return the runtime with the front."""
    return pair.front


@pytest.fixture
def sleeper(tmp_path: Path, busybox_rootfs: Path) -> Path:
    made = bundle(tmp_path / "sleeper", busybox_rootfs, "sh", "-c", "trap : USR1 TERM; while :; do sleep 1; done")
    edit(made, lambda value: value.update(annotations={"a": 'b"c\\d\n=', "é": "f"}))
    return made


def prepare(oci: Oci, made: Path, state: str) -> None:
    """Bring a container into a state."""
    for step in STATES[state]:
        if step == "create":
            assert oci.detached("create", "-b", str(made), NAME).status == 0
        elif step == "end":
            oci.ok("kill", NAME, "KILL")
            while oci.status(NAME) != "stopped":
                pass
        else:
            oci.ok(step, NAME)
            if step == "start":
                oci.ok("exec", NAME, "true")  # from now on the front can exec


def comparable(result: Result, oci: Oci) -> tuple[int, str, str]:
    """Return a result without what differs between two containers."""
    out = re.sub(r'"(pid|created)": [^\n]*', r'"\1"', result.out)
    return result.status, out, re.sub(r',"time":"[^"]*"', "", result.err).replace(str(oci.root), "ROOT")


@pytest.mark.parametrize(
    ("state", "command"), [(state, command) for state, commands in COMMANDS.items() for command in commands]
)
def test_both_do_and_say_the_same(pair: Pair, sleeper: Path, state: str, command: list[str]) -> None:
    found = []
    for oci in pair:
        prepare(oci, sleeper, state)
        result = oci(*command)
        deadline = time.monotonic() + 10
        while (known := oci("state", NAME)).status == 0 and time.monotonic() < deadline:
            if command[0] != "kill" or command[-1] != "KILL" or json.loads(known.out)["status"] == "stopped":
                break
        found.append((comparable(result, oci), comparable(known, oci)))
        oci.clear()
    assert found[0] == found[1]


def front_without_python(
    front: Path, oci: Oci, *args: str, instead: str = "/bin/false", **options: object
) -> subprocess.CompletedProcess[str]:
    """Return the front's result if there is no interpreter to hand over to."""
    argv = [str(front), instead, "-I", "-S", "-c", "", "caisson-oci", "/packages", "--root", str(oci.root), *args]
    env = {**os.environ, "CAISSON_NSEXEC": oci._env["CAISSON_NSEXEC"]}
    return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


def test_plain_commands_need_no_interpreter(oci: Oci, front_path: Path, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "sleep", "1000")
    prepare(oci, made, "created")
    assert front_without_python(front_path, oci, "start", NAME).returncode == 0
    assert oci.ok("exec", NAME, "echo", "first") == "first\n"
    assert json.loads(front_without_python(front_path, oci, "state", NAME).stdout)["status"] == "running"
    log = tmp_path / "log"
    done = front_without_python(front_path, oci, "--log", str(log), "exec", NAME, "sh", "-c", "cat; exit 4", input="in")
    assert (done.returncode, done.stdout, done.stderr, log.read_text()) == (4, "in", "", "")
    assert front_without_python(front_path, oci, "exec", NAME, "nothere").returncode == 1  # which Python reports better
    assert front_without_python(front_path, oci, "kill", NAME, "KILL").returncode == 0
    while json.loads(front_without_python(front_path, oci, "state", NAME).stdout)["status"] != "stopped":
        pass
    assert front_without_python(front_path, oci, "delete", NAME).returncode == 0
    assert list(oci.root.iterdir()) == []


@pytest.mark.parametrize(
    "args",
    [
        ["list"], ["--debug", "state", NAME], ["--root=relative", "state", NAME], ["state", "--help"], ["state"],
        ["exec", "-t", NAME, "true"], ["exec", "--cwd", "/", NAME, "true"], ["exec", "--", NAME, "true"],
        ["--systemd-cgroup", "exec", NAME, "true"], ["delete", "x", "y"], ["--root", "/", "state", NAME],
        ["--root", "/a/../b", "state", NAME], [],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_is_not_plain_is_handed_over_as_it_is(front_path: Path, oci: Oci, args: list[str]) -> None:
    done = front_without_python(front_path, oci, *args, instead="/bin/echo")
    assert done.stdout == " ".join(["-I -S -c  caisson-oci /packages --root", str(oci.root), *args]) + "\n"


def test_a_changed_configuration_is_read_again(
    oci: Oci, front_path: Path, tmp_path: Path, busybox_rootfs: Path
) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "sleep", "1000")
    prepare(oci, made, "running")
    assert front_without_python(front_path, oci, "exec", NAME, "true").returncode == 0
    edit(made, lambda value: value["process"].update(cwd="/tmp"))
    assert front_without_python(front_path, oci, "exec", NAME, "true").returncode == 1
    assert oci.ok("exec", NAME, "pwd") == "/tmp\n"
    assert front_without_python(front_path, oci, "exec", NAME, "pwd").stdout == "/tmp\n"
    with (made / "config.json").open("a") as file:
        file.write(" x")
    assert oci("exec", NAME, "true").status == 255


def test_home_is_that_of_the_container_now(oci: Oci, tmp_path: Path) -> None:
    from tests.native.nsexec_support import make_rootfs

    rootfs = make_rootfs(tmp_path / "rootfs")
    made = bundle(tmp_path / "b", rootfs, "sleep", "1000")
    prepare(oci, made, "running")
    assert oci.ok("exec", NAME, "sh", "-c", "echo $HOME") == "/root\n"
    (rootfs / "etc/passwd").write_text("x:x:1:1::/x:\nroot:x:0:0::/elsewhere:/bin/sh")
    assert oci.ok("exec", NAME, "sh", "-c", "echo $HOME") == "/elsewhere\n"
    (rootfs / "etc/passwd").unlink()
    (rootfs / "etc/passwd").symlink_to("/proc/self/root/etc/none")
    assert oci.ok("exec", NAME, "sh", "-c", "echo $HOME") == "/\n"


def test_exec_opens_no_special_file_of_the_container(pair: Pair, tmp_path: Path) -> None:
    """Opening a device can start it: a watchdog of the host, for example."""
    from tests.native.nsexec_support import make_rootfs

    rootfs = make_rootfs(tmp_path / "rootfs")
    (rootfs / "etc/passwd").unlink()
    os.mkfifo(rootfs / "etc/passwd")
    for oci in pair:
        prepare(oci, bundle(tmp_path / f"bundle-{oci.root.name}", rootfs, "sleep", "1000"), "running")
        with watch_opens(rootfs / "etc/passwd") as was_opened:
            assert oci.ok("exec", NAME, "sh", "-c", "echo $HOME") == "/\n"
            assert not was_opened()
        oci.ok("delete", "--force", NAME)


def test_streams_and_signals_of_an_exec(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    prepare(oci, bundle(tmp_path / "b", busybox_rootfs, "sleep", "1000"), "running")
    data = os.urandom(3_000_000).hex()
    assert oci("exec", NAME, "cat", stdin=data).out == data
    done = oci("exec", NAME, "sh", "-c", "head -c 1000000 /dev/zero >&2; echo end")
    assert (done.status, done.out, len(done.err)) == (0, "end\n", 1_000_000)
    script = "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen(
        oci.argv("exec", NAME, "sh", "-c", script), env=oci._env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert (process.stdout.read(), process.wait()) == (b"caught\n", 9)
    assert oci("exec", NAME, "sh", "-c", "kill -TERM $$").status == 128 + signal.SIGTERM
    assert oci.detached("exec", "-d", NAME, "true").status == 0
    with Path(os.devnull).open() as null:
        closed = subprocess.run(
            oci.argv("exec", NAME, "true"), env=oci._env, stdin=null, preexec_fn=lambda: os.close(0)
        )
    assert closed.returncode == 0


def test_a_program_that_cannot_be_executed_at_start(pair: Pair, tmp_path: Path) -> None:
    from tests.native.nsexec_support import make_rootfs

    rootfs = make_rootfs(tmp_path / "rootfs")
    (rootfs / "run.sh").write_text("#!/no/such\n")
    (rootfs / "run.sh").chmod(0o755)
    made = bundle(tmp_path / "b", rootfs, "/run.sh")
    found = []
    for oci in pair:
        prepare(oci, made, "created")
        found.append(comparable(oci("start", NAME), oci))
        oci.clear()
    assert found[0] == found[1]
    assert "exec /run.sh: no such file or directory" in found[0][2]


def test_a_front_older_than_its_sources_is_left_alone(tmp_path: Path) -> None:
    """A modified checkout: the script checks file times."""
    place = tmp_path / "packages" / "caisson" / "agent"
    for name in ("runtime", "nsexec/front", "nsexec/build"):
        (place / name).mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/src").symlink_to(tmp_path / "packages")
    (tmp_path / "bin/caisson-oci").write_bytes(OURS.read_bytes())
    (tmp_path / "bin/caisson-oci").chmod(0o755)
    front, python = place / "nsexec/build/caisson-oci", tmp_path / "bin/python3"
    for program, says in ((front, "front"), (python, "python")):
        program.write_text(f"#!/bin/sh\necho {says}\n")
        program.chmod(0o755)
    sources = [place / name for name in ("nsexec/Makefile", "nsexec/sys.h", "nsexec/front/main.c")]
    for source in sources:
        source.touch()

    def chosen() -> str:
        env = {name: value for name, value in os.environ.items() if name != "CAISSON_FRONT"}
        return subprocess.run(
            [tmp_path / "bin/caisson-oci", "state", "x"], env=env, capture_output=True, text=True
        ).stdout

    later = time.time() + 10
    os.utime(front, (later, later))
    assert chosen() == "front\n"
    os.utime(sources[-1], (later + 1, later + 1))
    assert chosen() == "python\n"
    front.unlink()
    assert chosen() == "python\n"


def test_a_script_without_its_package_says_where_it_works(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    alone = tmp_path / "bin/caisson-oci"
    alone.write_bytes(OURS.read_bytes())
    alone.chmod(0o755)
    done = subprocess.run([alone, "--version"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"{alone}: no package beside it") and done.stderr.count("\n") == 1

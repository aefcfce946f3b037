"""Test the commands of the OCI command line: effects, output and status, to the letter where callers match them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.native.oci_support import OURS, Oci, bundle, cgroup_of, edit
from tests.support.poll import wait_until

pytestmark = pytest.mark.root
NAME = f"oci-{os.getpid()}"


def test_life_of_a_container(oci: Oci, sleeper: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    assert oci.detached("create", "-b", str(sleeper), "--pid-file", str(pid_file), NAME).status == 0
    state = oci.state(NAME)
    assert list(state) == ["ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "owner"]
    assert state["ociVersion"] == json.loads(oci.ok("features"))["ociVersionMax"]  # not that of config.json
    assert (state["status"], state["bundle"], pid_file.read_text()) == ("created", str(sleeper), str(state["pid"]))
    assert oci(*("exec", NAME, "echo", "before")).out == "before\n"
    assert oci.status(NAME) == "created"
    oci.ok("start", NAME)
    assert oci.status(NAME) == "running"
    assert oci("start", NAME).message == "cannot start an already running container"
    oci.ok("pause", NAME)
    assert oci.status(NAME) == "paused"
    oci.ok("resume", NAME)
    assert oci("resume", NAME).message == "container not paused"
    assert oci("delete", NAME).message == f"cannot delete container {NAME} that is not stopped: running"
    oci.ok("kill", NAME, "KILL")
    wait_until(lambda: oci.status(NAME) == "stopped", "it stops")
    assert oci.state(NAME)["pid"] == 0
    assert oci("kill", NAME, "KILL").message == "container not running"
    assert oci("kill", "-a", NAME, "KILL").status == 0
    assert oci("start", NAME).message == "cannot start a container that has stopped"
    assert oci("exec", NAME, "true").message == "exec failed: cannot exec in a stopped container"
    oci.ok("delete", NAME)
    assert oci("state", NAME).message == "container does not exist"
    assert oci("delete", NAME).status == 1
    assert oci("delete", "--force", NAME).status == 0


@pytest.mark.parametrize(
    ("script", "status", "out"),
    [("echo hi", 0, "hi\n"), ("exit 7", 7, ""), ("cat", 0, "in\n")],
)
def test_run_ends_as_its_process(
    oci: Oci, tmp_path: Path, busybox_rootfs: Path, script: str, status: int, out: str
) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "sh", "-c", f"{script}")
    result = oci("run", "-b", str(made), NAME, stdin="in\n")
    assert (result.status, result.out, result.err) == (status, out, "")
    assert oci.ok("list", "-q") == ""


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("nothere", 'exec: "nothere": executable file not found in $PATH'),
        ("/nothere", 'exec: "/nothere": stat /nothere: no such file or directory'),
        ("/etc/passwd", 'exec: "/etc/passwd": permission denied'),
    ],
)
def test_programs_that_are_not_there(
    oci: Oci, sleeper: Path, tmp_path: Path, busybox_rootfs: Path, program: str, message: str
) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, program)
    whole = f"unable to start container process: {message}"
    for command in ("create", "run"):
        result = oci.detached(command, "-b", str(made), *(["-d"] if command == "run" else []), NAME)
        assert (result.status, result.message) == (1, f"runc {command} failed: {whole}")
        assert oci.ok("list", "-q") == ""
    oci.running(sleeper, NAME)
    result = oci("exec", NAME, program)
    assert (result.status, result.message) == (255, f"exec failed: {whole}")


def test_a_bad_interpreter_is_the_process_s_own_error(oci: Oci, tmp_path: Path, nsexec_path: Path) -> None:
    from tests.native.nsexec_support import make_rootfs

    rootfs = make_rootfs(tmp_path / "rootfs")
    (rootfs / "run.sh").write_text("#!/no/such\n")
    (rootfs / "run.sh").chmod(0o755)
    result = oci("run", "-b", str(bundle(tmp_path / "b", rootfs, "/run.sh")), NAME)
    assert (result.status, result.err) == (1, "exec /run.sh: no such file or directory\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b", "invalid container ID format"),
        ("..", "invalid container ID format"),
        ("", "container id cannot be empty"),
    ],
)
def test_ids_that_are_refused(oci: Oci, sleeper: Path, name: str, message: str) -> None:
    assert oci("run", "-b", str(sleeper), name).message == f"runc run failed: {message}"


def test_what_is_missing_is_named(oci: Oci, tmp_path: Path) -> None:
    assert (
        oci("run", "-b", str(tmp_path), NAME).message
        == "runc run failed: JSON specification file config.json not found"
    )
    assert oci("state", NAME).message == "container does not exist"


def test_a_root_that_is_no_directory(oci: Oci, sleeper: Path) -> None:
    edit(sleeper, lambda value: value["root"].update(path="config.json"))
    expected = f"runc run failed: invalid rootfs: stat {sleeper}/config.json: not a directory"
    assert oci("run", "-b", str(sleeper), NAME).message == expected


def test_an_id_is_taken_once(oci: Oci, sleeper: Path) -> None:
    oci.running(sleeper, NAME)
    result = oci.detached("create", "-b", str(sleeper), NAME)
    assert result.message == "runc create failed: container with given ID already exists"
    assert oci.status(NAME) == "running"


def test_exec_options(oci: Oci, sleeper: Path, tmp_path: Path) -> None:
    pid = oci.running(sleeper, NAME)
    assert oci("exec", NAME, "sh", "-c", "echo out; echo err >&2; exit 3").__dict__ == {
        "status": 3, "out": "out\n", "err": "err\n",
    }  # fmt: skip
    assert oci.ok("exec", "--cwd", "/tmp", NAME, "pwd") == "/tmp\n"
    assert oci.ok("exec", "-e", "A=b c", "-e", "X=", NAME, "sh", "-c", "echo $A-$X-$HOME") == "b c--/root\n"
    assert oci.ok("exec", "-u", "1000:100", "-g", "5", "-g", "6", NAME, "id").startswith("uid=1000 gid=100")
    assert oci("exec", "-u", "root", NAME, "id").message.startswith("exec failed: bad uid: strconv.Atoi: ")
    capabilities = oci.ok("exec", "--cap", "CAP_SYS_ADMIN", NAME, "grep", "CapEff", "/proc/self/status")
    assert int(capabilities.split()[1], 16) & 1 << 21
    assert oci.ok("exec", NAME, "ls", "-d", "/bin") == "/bin\n"  # these options are the program's
    assert oci.ok("exec", NAME, "cat", stdin="abc") == "abc"
    process = {"args": ["sh", "-c", "echo $A; id -u; pwd"], "cwd": "/tmp", "env": ["A=1", "PATH=/bin"],
               "user": {"uid": 1000, "gid": 1000}}  # fmt: skip
    (tmp_path / "process.json").write_text(json.dumps(process))
    assert oci.ok("exec", "-p", str(tmp_path / "process.json"), NAME) == "1\n1000\n/tmp\n"
    missing = oci("exec", "--cwd", "/nothere", NAME, "true")
    assert missing.status == 255 and 'chdir to cwd ("/nothere")' in missing.message
    assert cgroup_of(pid, "pids").name == NAME


def test_exec_in_a_paused_container(oci: Oci, sleeper: Path) -> None:
    oci.running(sleeper, NAME)
    oci.ok("pause", NAME)
    result = oci("exec", NAME, "true")
    words = "exec failed: cannot exec in a paused container (use --ignore-paused to override)"
    assert (result.status, result.message) == (255, words)
    oci.ok("update", "--pids-limit", "20", NAME)
    assert oci.status(NAME) == "paused"
    oci.ok("kill", NAME, "KILL")  # thaws
    wait_until(lambda: oci.status(NAME) == "stopped", "it stops")


def test_ps_and_list(oci: Oci, sleeper: Path) -> None:
    assert oci.detached("exec", "-d", "nothere", "true").status == 255
    pid = oci.running(sleeper, NAME)
    assert oci.ok("ps", "-f", "json", NAME) == f"[{pid}]\n"
    header, line = oci.ok("ps", NAME).splitlines()
    assert header.split()[:2] == ["UID", "PID"] and line.split()[1] == str(pid)
    assert oci.ok("ps", NAME, "-e", "-x").splitlines()[0].split()[0] == "PID"
    rows = [line.split() for line in oci.ok("list").splitlines()]
    assert rows[0] == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    assert rows[1][:3] == [NAME, str(pid), "running"] and rows[1][-1] == "root"
    (one,) = json.loads(oci.ok("list", "-f", "json"))
    assert (one["id"], one["owner"]) == (NAME, "root")
    assert oci("list", "-f", "xml").message == "invalid format option"


def test_list_without_containers(oci: Oci) -> None:
    result = oci("list")
    assert result.status == 1 and result.message.endswith("no such file or directory")
    oci.root.mkdir()
    assert oci.ok("list", "-f", "json") == "null\n"


def test_update(oci: Oci, sleeper: Path) -> None:
    pid = oci.running(sleeper, NAME)
    memory, cpu, pids = (cgroup_of(pid, name) for name in ("memory", "cpu", "pids"))
    oci.ok("update", "--memory", "64M", "--cpu-share", "200", "--cpu-quota", "50000", "--cpu-period", "100000", NAME)
    assert (memory / "memory.limit_in_bytes").read_text() == f"{64 << 20}\n"
    assert (cpu / "cpu.shares").read_text() == "200\n"
    oci.ok("update", "-r", "-", NAME, stdin='{"memory": {"limit": 33554432}, "pids": {"limit": 30}}')
    assert (memory / "memory.limit_in_bytes").read_text() == f"{32 << 20}\n"
    assert (cpu / "cpu.shares").read_text() == "200\n"
    assert (pids / "pids.max").read_text() == "30\n"
    assert "invalid value for memory" in oci("update", "--memory", "x", NAME).message
    words = "Intel RDT/CAT: l3 cache schema is not enabled"
    assert oci("update", "--l3-cache-schema", "L3:0=f", NAME).message == words


def test_events(oci: Oci, sleeper: Path) -> None:
    assert oci("events", "--interval", "0s", NAME).message == "duration interval must be greater than 0"
    oci.running(sleeper, NAME)
    (line,) = oci.ok("events", "--stats", NAME).splitlines()
    event = json.loads(line)
    assert (list(event), event["type"], event["id"]) == (["type", "id", "data"], "stats", NAME)
    assert event["data"]["pids"]["current"] == 1 and event["data"]["memory"]["usage"]["usage"] > 0
    with subprocess.Popen(
        oci.argv("events", "--interval", "50ms", NAME), stdout=subprocess.PIPE, text=True
    ) as follower:
        assert follower.stdout is not None
        assert json.loads(follower.stdout.readline())["type"] == "stats"
        oci.ok("delete", "-f", NAME)
        assert follower.wait(20) == 0
    assert oci("events", "--stats", NAME).message == "container does not exist"


def test_kill_takes_names_and_numbers(oci: Oci, sleeper: Path) -> None:
    oci.running(sleeper, NAME)
    assert oci("kill", NAME, "XX").message == 'unknown signal "XX"'
    for text in ("0", "SIGUSR1", "usr2", "WINCH"):
        oci.ok("kill", NAME, text)
    oci.ok("kill", NAME, str(int(signal.SIGKILL)))
    wait_until(lambda: oci.status(NAME) == "stopped", "it stops")


def test_sigkill_without_a_pid_namespace_ends_all(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "sh", "-c", "sleep 1000 & sleep 1000; true")
    edit(made, lambda value: value["linux"].update(namespaces=[{"type": "mount"}, {"type": "uts"}]))
    oci.running(made, NAME)
    wait_until(lambda: len(json.loads(oci.ok("ps", "-f", "json", NAME))) == 3, "no second process")
    oci.ok("kill", NAME, "KILL")
    wait_until(lambda: oci.ok("ps", "-f", "json", NAME) == "null\n", "all processes exit")
    oci.ok("delete", NAME)


def test_log_files_hold_errors_and_so_does_stderr(oci: Oci, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for form in ("json", "text"):
        done = subprocess.run(
            [str(OURS), "--log", str(log), "--log-format", form, "--root", str(oci.root), "state", "nothere"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (1, "container does not exist\n")
    first, second = log.read_text().splitlines()
    assert json.loads(first).keys() == {"level", "msg", "time"} and json.loads(first)["level"] == "error"
    assert second.endswith('level=error msg="container does not exist"')
    assert oci.root.parent.joinpath("log").stat().st_mode & 0o777 == 0o644


def test_debug_has_the_setups_own_lines(oci: Oci, tmp_path: Path, busybox_rootfs: Path, nsexec_path: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "true")
    done = subprocess.run(
        [str(OURS), "--debug", "--root", str(oci.root), "run", "-b", str(made), NAME],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, env=oci._env,
    )  # fmt: skip
    assert done.returncode == 0
    for words in (
        "level=debug",
        "nsexec container setup",
        "child process in init()",
        "init: closing the pipe to signal completion",
    ):
        assert words in done.stderr, words


def test_help_version_and_mistakes(oci: Oci) -> None:
    assert [line.split(" ")[0] for line in oci.ok("--version").splitlines()] == ["runc", "commit:", "spec:"]
    assert oci.ok("--help").splitlines()[:2] == ["NAME:", "   caisson-oci - Open Container Initiative runtime"]
    for verb in ("create", "start", "run", "exec", "kill", "delete", "state", "list", "ps", "pause", "resume", "update",
                 "events", "spec", "features", "checkpoint", "restore"):  # fmt: skip
        assert oci.ok(verb, "--help").splitlines()[1].startswith(f"   caisson-oci {verb} - ")
    unknown = oci("foo")
    assert (unknown.status, unknown.message) == (3, "No help topic for 'foo'")
    few = oci("state")
    assert few.status == 1 and few.out.startswith("Incorrect Usage.\n")
    assert few.message == 'runc: "state" requires exactly 1 argument(s)'
    assert oci("state", "--nope", "x").out.startswith("Incorrect Usage: flag provided but not defined: -nope")


@pytest.mark.parametrize("verb", ["checkpoint", "restore"])
def test_checkpoints_are_refused_by_name(oci: Oci, verb: str) -> None:
    result = oci(verb, "--image-path", "/x", NAME)
    assert result.status == 1 and f"{verb}: not supported" in result.message


def test_systemd_cgroups_are_refused_by_name(oci: Oci, sleeper: Path) -> None:
    done = subprocess.run(
        [str(OURS), "--systemd-cgroup", "--root", str(oci.root), "run", "-b", str(sleeper), NAME],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "systemd" in done.stderr


def test_features(oci: Oci) -> None:
    features = json.loads(oci.ok("features"))
    assert features["ociVersionMin"] == "1.0.0" and "rro" in features["mountOptions"]
    assert features["annotations"]["org.opencontainers.runc.checkpoint.enabled"] == "false"


def test_spec(tmp_path: Path, oci: Oci) -> None:
    oci.ok("spec", "-b", str(tmp_path))
    value = json.loads((tmp_path / "config.json").read_text())
    assert value["process"]["terminal"] is True and value["hostname"] == "runc"
    assert oci("spec", "-b", str(tmp_path)).message == "File config.json exists. Remove it first"


def test_a_created_container_ends_by_a_signal(oci: Oci, sleeper: Path) -> None:
    assert oci.detached("create", "-b", str(sleeper), NAME).status == 0
    oci.ok("kill", NAME, "TERM")
    wait_until(lambda: oci.status(NAME) == "stopped", "it stops")


def test_run_keep(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "true")
    oci.ok("run", "--keep", "-b", str(made), NAME)
    assert oci.status(NAME) == "stopped"
    oci.ok("delete", NAME)

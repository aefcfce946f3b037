"""Test what docker users do, with our runtime and with runc: the same output, the same status."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson import image
from tests.shim.engine import RUNTIME, SHIM, Engine, children
from tests.support.poll import wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(600)]

SLEEPER = 'trap "echo bye; exit 3" TERM; echo $A; pwd; id -u; hostname; while :; do sleep 0.1; done'


def both(docker: Engine, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a container by `docker run --rm` with runc and with ours; the results must be the same."""
    runc, ours = (
        docker.docker("run", "--rm", "--interactive", "--network", "none", "--runtime", name, *words, stdin=stdin)
        for name in ("runc", RUNTIME)
    )
    assert (ours.returncode, ours.stdout) == (runc.returncode, runc.stdout), ours.stderr
    return ours


@pytest.fixture
def sleeper(docker: Engine) -> Iterator[tuple[str, str]]:
    """Start the same container with runc and with ours; it prints a goodbye when stopped."""
    names = ("runc", "ours")
    for name, runtime in zip(names, ("runc", RUNTIME), strict=True):
        started = docker.docker(
            "run", "--detach", "--name", name, "--runtime", runtime, "--network", "none", "--hostname", "hh",
            "--env", "A=1", "--workdir", "/tmp", "--user", "65534", "busybox", "sh", "-c", SLEEPER,
        )  # fmt: skip
        assert started.returncode == 0, started.stderr
        wait_until(lambda name=name: docker.docker("logs", name).stdout.count(b"\n") == 4, "its output")  # type: ignore[misc]
    yield names
    docker.docker("rm", "--force", *names)


def same(docker: Engine, names: tuple[str, str], *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a docker command on both containers (NAME stands for one); the results must be the same."""
    runc, ours = (docker.docker(*(word.replace("NAME", name) for word in words), stdin=stdin) for name in names)
    assert (ours.returncode, ours.stdout.replace(b"ours", b"runc")) == (runc.returncode, runc.stdout), ours.stderr
    return ours


def test_run_passes_streams_and_status(docker: Engine) -> None:
    done = both(docker, "busybox", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert both(docker, "busybox", "wc", "-c", stdin=bytes(3_000_000)).stdout.split() == [b"3000000"]


@pytest.mark.parametrize(("program", "status"), [("nosuch", 127), ("", 127), ("/etc/passwd", 126)])
def test_run_reports_what_cannot_be_executed(docker: Engine, program: str, status: int) -> None:
    assert both(docker, "busybox", program).returncode == status


def test_run_honours_security_options(docker: Engine) -> None:
    both(docker, "--cap-drop", "ALL", "--cap-add", "CHOWN", "busybox", "grep", "Cap", "/proc/self/status")
    both(docker, "--read-only", "--tmpfs", "/tmp", "busybox", "sh", "-c", "touch /x; touch /tmp/y && echo written")
    both(docker, "--ulimit", "nofile=77:88", "busybox", "sh", "-c", "ulimit -n; ulimit -Hn")
    both(docker, "--group-add", "55", "--group-add", "root", "busybox", "id")
    both(docker, "--security-opt", "no-new-privileges", "busybox", "grep", "NoNewPrivs", "/proc/self/status")


@pytest.mark.parametrize("runtime", ["runc", RUNTIME])
def test_a_terminal_has_its_size_before_the_program_starts(docker: Engine, runtime: str) -> None:
    words = ["run", "--rm", "-it", "--network", "none", "--runtime", runtime, "busybox"]
    done = docker.on_terminal(37, 111, *words, "sh", "-c", "'stty size; exit 4'")
    assert (done.returncode, done.stdout.removeprefix(b"^@").split()) == (4, [b"37", b"111"])  # script(1) adds a NUL


def test_the_guest_is_a_machine_of_its_own(docker: Engine) -> None:
    done = docker.docker("run", "--rm", "--runtime", RUNTIME, "--network", "none", "busybox", "cat", "/proc/mounts")
    assert b" / virtiofs " in done.stdout


def test_exec_takes_user_directory_and_environment(docker: Engine, sleeper: tuple[str, str]) -> None:
    words = [
        "exec",
        "--env",
        "B=2",
        "--user",
        "0",
        "--workdir",
        "/etc",
        "NAME",
        "sh",
        "-c",
        "echo $B; pwd; id -u; exit 9",
    ]
    assert same(docker, sleeper, *words).returncode == 9
    assert same(docker, sleeper, "exec", "-i", "NAME", "cat", stdin=b"abc").stdout == b"abc"
    missing = [docker.docker("exec", name, "nosuch") for name in sleeper]
    assert missing[0].returncode == missing[1].returncode
    assert all(b'exec: "nosuch": executable file not found in $PATH' in one.stdout + one.stderr for one in missing)


def test_a_container_is_paused_updated_and_copied_from(docker: Engine, sleeper: tuple[str, str]) -> None:
    same(docker, sleeper, "pause", "NAME")
    same(docker, sleeper, "inspect", "--format", "{{.State.Status}}", "NAME")
    same(docker, sleeper, "unpause", "NAME")
    same(docker, sleeper, "update", "--memory", "64m", "--memory-swap", "64m", "NAME")
    same(docker, sleeper, "cp", "/etc/hostname", "NAME:/tmp/copied")
    same(docker, sleeper, "exec", "NAME", "cat", "/tmp/copied")


def test_a_container_is_stopped_started_killed_and_waited_for(docker: Engine, sleeper: tuple[str, str]) -> None:
    same(docker, sleeper, "stop", "--time", "20", "NAME")
    assert same(docker, sleeper, "logs", "NAME").stdout == b"1\n/tmp\n65534\nhh\nbye\n"
    same(docker, sleeper, "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "NAME")
    same(docker, sleeper, "start", "NAME")
    same(docker, sleeper, "kill", "--signal", "KILL", "NAME")
    assert same(docker, sleeper, "wait", "NAME").stdout == b"137\n"


def test_out_of_memory_is_told(docker: Engine) -> None:
    words = ["--network", "none", "--memory", "32m", "--memory-swap", "32m", "busybox", "tail", "/dev/zero"]
    done = docker.docker("run", "--name", "hog", "--runtime", RUNTIME, *words)
    assert done.returncode == 137
    state = docker.docker("inspect", "--format", "{{.State.OOMKilled}}", "hog").stdout
    docker.docker("rm", "hog")
    assert state == b"true\n"


def fetched(url: str) -> bytes:
    """Return what is served at a URL; nothing while the server is starting: the proxy listens earlier."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return bytes(answer.read())
    except OSError:
        return b""


def test_volumes_and_a_published_port(docker: Engine) -> None:
    page = docker.place / "page"
    page.mkdir()
    (page / "index.html").write_text("from the host")
    assert docker.docker("network", "create", "pods").returncode == 0
    script = "echo written > /www/made; httpd -f -p 80 -h /www"
    try:
        started = docker.docker(
            "run", "--detach", "--name", "web", "--runtime", RUNTIME, "--network", "pods", "--memory", "64m",
            "--publish", "127.0.0.1:0:80", "--volume", f"{page}:/www", "busybox", "sh", "-c", script,
        )  # fmt: skip
        assert started.returncode == 0, started.stderr
        address = docker.docker("port", "web", "80").stdout.decode().strip()
        wait_until(lambda: fetched(f"http://{address}/") == b"from the host", "the published port's page")
        assert (page / "made").read_text() == "written\n"
        usage = docker.docker("stats", "--no-stream", "--format", "{{.MemUsage}}", "web").stdout
        assert usage.endswith(b"/ 64MiB\n")
        neighbour = ["run", "--rm", "--runtime", RUNTIME, "--network", "pods", "busybox", "wget", "-qO-"]
        route = docker.docker("inspect", "--format", "{{.NetworkSettings.Networks.pods.IPAddress}}", "web").stdout
        page_there = docker.docker(*neighbour, f"http://{route.decode().strip()}/")
        assert page_there.stdout == b"from the host", page_there.stderr
        by_name = docker.docker(*neighbour, "http://web/")
        assert by_name.stdout == b"from the host", by_name.stderr
    finally:
        docker.docker("rm", "--force", "web")
        docker.docker("network", "rm", "pods")


def test_shared_memory_has_the_size_asked_for_or_is_a_volume(docker: Engine) -> None:
    for options in (["--shm-size", "3m"], ["--ipc", "shareable", "--shm-size", "3m"]):
        both(docker, *options, "busybox", "df", "/dev/shm")
    (docker.place / "shm").mkdir()
    (docker.place / "shm/file").touch()
    assert both(docker, "--volume", f"{docker.place}/shm:/dev/shm", "busybox", "ls", "/dev/shm").stdout == b"file\n"


def test_a_networks_name_server_is_told_in_full(docker: Engine) -> None:
    assert docker.docker("network", "create", "named").returncode == 0
    words = ["--network", "named", "--dns-search", "a.example", "busybox", "cat", "/etc/resolv.conf"]
    runc, ours = (docker.docker("run", "--rm", "--runtime", name, *words).stdout for name in ("runc", RUNTIME))
    docker.docker("network", "rm", "named")
    assert b"127.0.0.11" in runc and ours == runc.replace(b"127.0.0.11", b"169.254.0.11")


def test_an_update_reaches_the_hosts_side(docker: Engine, sleeper: tuple[str, str]) -> None:
    same(docker, sleeper, "update", "--cpuset-cpus", "0", "NAME")
    (vm,) = docker.vms()
    supervisor = json.loads((docker.run / vm / "vm.json").read_text())["pids"]["supervisor"]
    assert "Cpus_allowed_list:\t0\n" in Path(f"/proc/{supervisor}/status").read_text()


def test_hosts_can_be_added_and_sysctls_set(docker: Engine) -> None:
    script = "grep other /etc/hosts; cat /proc/sys/net/ipv4/ip_unprivileged_port_start"
    options = ["--add-host", "other:10.1.2.3", "--sysctl", "net.ipv4.ip_unprivileged_port_start=77"]
    assert both(docker, *options, "busybox", "sh", "-c", script).stdout.split() == [b"10.1.2.3", b"other", b"77"]


def test_a_privileged_container_has_all_capabilities_and_no_device_of_the_host(docker: Engine) -> None:
    script = "mknod /dev/mem0 c 1 1 && grep -q ffffffff /proc/self/status && echo made"
    words = ["run", "--rm", "--privileged", "--network", "none", "--runtime", RUNTIME, "busybox", "sh", "-c", script]
    done = docker.docker(*words)
    assert done.stdout == b"made\n", done.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--network", "host"], b"host's network"),
        (["--pid", "host", "--network", "none"], b"host's pid namespace"),
        (["--device", "/dev/full", "--network", "none"], b"/dev/full"),
    ],
)
def test_what_no_guest_has_is_refused_by_name(docker: Engine, options: list[str], text: bytes) -> None:
    done = docker.docker("run", "--rm", "--runtime", RUNTIME, *options, "busybox", "true")
    assert done.returncode == 125 and text in done.stderr


def test_a_killed_shim_leaves_nothing(docker: Engine) -> None:
    started = docker.docker(
        "run", "--detach", "--name", "lost", "--runtime", RUNTIME, "--network", "none", "busybox", "sleep", "1000"
    )
    container = started.stdout.decode().strip()
    assert docker.vms() != [], started.stderr
    subprocess.run(["pkill", "--signal", "KILL", "--full", f"containerd-shim-caisson-v2 .*-id {container}"], check=True)
    assert docker.docker("wait", "lost").stdout == b"137\n"
    docker.docker("rm", "--force", "lost")
    assert docker.vms() == [] and docker.mounts() == []
    assert docker.docker("run", "--rm", "--runtime", RUNTIME, "--network", "none", "busybox", "true").returncode == 0


def test_a_killed_virtiofsd_ends_the_container(docker: Engine) -> None:
    docker.docker(
        "run", "--detach", "--name", "rootless", "--runtime", RUNTIME, "--network", "none", "busybox", "sleep", "1000"
    )
    (vm,) = docker.vms()
    (pid, *_) = children(json.loads((docker.run / vm / "vm.json").read_text())["pids"]["supervisor"], "virtiofsd")
    os.kill(pid, signal.SIGKILL)
    assert docker.docker("wait", "rootless").stdout == b"137\n"
    docker.docker("rm", "--force", "rootless")
    assert docker.vms() == [] and docker.mounts() == []


def test_a_shim_serves_its_container_while_its_package_is_replaced(docker: Engine) -> None:
    installed, program = docker.place / "installed", docker.place / "bin/containerd-shim-earlier-v2"
    packages = Path(image.__file__).parents[1]
    for package in packages.iterdir():
        shutil.copytree(package, installed / packages.name / package.name)
    ours = str(packages.parent)
    earlier = f"import sys; sys.path[:] = [{str(installed)!r}, *(one for one in sys.path if one != {ours!r})]"
    program.write_text(SHIM.format(python=sys.executable).replace("\n", f"\n{earlier}\n", 1))
    program.chmod(0o755)
    started = docker.docker(
        "run", "--detach", "--name", "long", "--runtime", "io.containerd.earlier.v2", "--network", "none", "busybox",
        "sh", "-c", SLEEPER,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    shutil.rmtree(installed)  # no module of another version must be imported, so none can be
    program.write_text(SHIM.format(python=sys.executable))
    assert docker.docker("exec", "--interactive", "long", "cat", stdin=b"again").stdout == b"again"
    for words in (("pause", "long"), ("unpause", "long"), ("update", "--cpu-shares", "512", "long"), ("stop", "long")):
        done = docker.docker(*words)
        assert done.returncode == 0, done.stderr
    assert docker.docker("wait", "long").stdout == b"3\n"
    assert docker.docker("logs", "long").stdout.endswith(b"bye\n")
    docker.docker("rm", "--force", "long")
    assert docker.vms() == [] and docker.mounts() == []

"""Test what nerdctl's users do, with our runtime and with runc; it copies files by /proc/PID/root of a task's pid."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shim.engine import RUNTIME, Engine
from tests.support.golang import Module
from tests.support.poll import wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.nightly, pytest.mark.timeout(1200)]

SLEEPER = 'trap "echo bye; exit 3" TERM; echo started; while :; do sleep 0.1; done'


class Nerdctl:
    """nerdctl on docker's containerd."""

    def __init__(self, program: Path, docker: Engine) -> None:
        place = docker.place
        self._command = [
            str(program), "--address", f"{place}/containerd.sock", "--data-root", f"{place}/nerdctl", "--snapshotter",
            "native", "--cni-netconfpath", f"{place}/cni", "--cgroup-manager", "cgroupfs",
        ]  # fmt: skip
        self._environment = docker.environment

    def __call__(self, *words: str, stdin: bytes = b"", status: int = 0) -> str:
        """Run a command that must exit with this status; return its output."""
        command = [*self._command, *words]
        done = subprocess.run(command, input=stdin, env=self._environment, capture_output=True, timeout=300)
        assert done.returncode == status, done.stderr.decode()
        return done.stdout.decode().strip()


@pytest.fixture(scope="module")
def nerdctl(docker: Engine, tmp_path_factory: pytest.TempPathFactory) -> Nerdctl:
    module = Module(Path(__file__).with_name("go_nerdctl"), tmp_path_factory.mktemp("go") / "nerdctl")
    made = Nerdctl(module.build("github.com/containerd/nerdctl/v2/cmd/nerdctl", "nerdctl"), docker)
    made("load", stdin=docker.docker("save", "busybox").stdout)
    return made


@pytest.fixture(params=["runc", RUNTIME])
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def container(nerdctl: Nerdctl, docker: Engine, runtime: str) -> Iterator[str]:
    """Start a container that says a goodbye."""
    nerdctl(
        "run", "--detach", "--name", "c1", "--network", "none", "--memory", "64m", "--runtime", runtime, "busybox",
        "sh", "-c", SLEEPER,
    )  # fmt: skip
    wait_until(lambda: nerdctl("logs", "c1") == "started", "its output")
    yield "c1"
    nerdctl("rm", "--force", "c1")
    assert docker.vms() == [] and docker.mounts() == []


def test_run_passes_streams_and_status(nerdctl: Nerdctl, runtime: str) -> None:
    common = ("run", "--rm", "--network", "none", "--runtime", runtime)
    assert nerdctl(*common, "busybox", "sh", "-c", "echo out; exit 7", status=7) == "out"


def test_input_ends_however_soon_it_is_closed(nerdctl: Nerdctl) -> None:
    """nerdctl calls CloseIO once, as soon as it has sent all."""
    for size in (2, 300_000):  # nothing at all: it calls CloseIO at once, and waits forever with any runtime
        words = ("run", "--rm", "--network", "none", "--interactive", "--runtime", RUNTIME, "busybox", "wc", "-c")
        assert nerdctl(*words, stdin=bytes(size)) == str(size)


def test_exec_stats_pause_and_restart(nerdctl: Nerdctl, container: str) -> None:
    assert nerdctl("exec", "--interactive", container, "wc", "-c", stdin=bytes(300_000)) == "300000"
    words = ("--user", "1000:1000", "--workdir", "/tmp", container, "sh", "-c", "id -u; pwd")
    assert nerdctl("exec", *words) == "1000\n/tmp"
    assert "64MiB" in nerdctl("stats", "--no-stream", container)
    nerdctl("pause", container)
    assert nerdctl("ps", "--all", "--format", "{{.Status}}") == "Paused"
    nerdctl("unpause", container)
    nerdctl("restart", container)
    wait_until(lambda: nerdctl("logs", container).split() == ["started", "bye", "started"], "its second output")
    nerdctl("stop", container)
    assert nerdctl("inspect", "--format", "{{.State.ExitCode}}", container) == "3"
    assert nerdctl("logs", container).split() == ["started", "bye", "started", "bye"]


def test_files_are_copied_into_the_containers_root_and_out_of_it(
    nerdctl: Nerdctl, container: str, tmp_path: Path
) -> None:
    name = f"of-{container}-{os.getpid()}"
    (tmp_path / "in").write_text("copied\n")
    nerdctl("cp", str(tmp_path / "in"), f"{container}:/tmp/{name}")
    assert nerdctl("exec", container, "cat", f"/tmp/{name}") == "copied"
    assert not Path(f"/tmp/{name}").exists(), "it went to this host"
    nerdctl("cp", f"{container}:/tmp/{name}", str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "copied\n"

"""Provide the environment of native tests: a freshly built nsexec, a box for it, and an agent on this machine."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from caisson.agent.libcontainer.process.nsexec import Nsexec
from tests.native.agent_support import ROOT, RunningAgent
from tests.native.command_box import CommandBox
from tests.native.nsexec_support import Box, make_rootfs
from tests.native.oci_support import OURS, Oci, become_subreaper, bundle, reaping

#: Tests of the library that do not apply to a command, with reasons.
LIBRARY_ONLY = {
    r"test_names_that_are_not_valid[command-devices3-eth0\\.mtu]": "a command ignores unknown fields",
    "test_exec_failures_read_as_runcs_and_leave_nothing": "its texts by a command are in test_oci_commands.py",
    **dict.fromkeys(
        (
            "test_a_mounts_parent",
            "test_proc_itself",
            "test_dev_itself",
            "test_a_process_being_made_gives_no_way_into_the_guest",
        ),
        "hundreds of processes: the race is in nsexec, which is the same",
    ),
}


@pytest.fixture(scope="session")
def nsexec_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build nsexec."""
    build = tmp_path_factory.mktemp("nsexec")
    subprocess.run(["make", "-s", "-C", ROOT / "agent/nsexec", f"BUILD={build}"], check=True)
    return build / "nsexec"


@pytest.fixture(scope="session")
def front_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the front of the OCI command line."""
    build = tmp_path_factory.mktemp("front")
    subprocess.run(["make", "-s", "-C", ROOT / "agent/nsexec", f"BUILD={build}", "front"], check=True)
    return build / "caisson-oci"


@pytest.fixture(scope="session")
def sealed(nsexec_path: Path) -> Iterator[Nsexec]:
    """Return the sealed program."""
    nsexec = Nsexec.seal(nsexec_path)
    yield nsexec
    nsexec.close()


@pytest.fixture(params=["library", "command"])
async def box(sealed: Nsexec, nsexec_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Box]:
    """Provide a fresh bundle; fail if anything is left behind.

    Two drivers are tested against every rule of the runtime: the library's launcher, and the OCI command line.
    """
    by_command = request.param == "command"
    for name in (request.function.__name__, request.node.name):
        if by_command and name in LIBRARY_ONLY:
            pytest.skip(LIBRARY_ONLY[name])
    with tempfile.TemporaryDirectory(prefix="caisson-box-") as directory:
        path = Path(directory)
        path.chmod(0o755)  # pytest's own directories are inaccessible to the root of a user namespace
        rootfs = make_rootfs(path / "rootfs")
        box = CommandBox(path, rootfs, nsexec_path) if by_command else Box(path, rootfs, sealed)
        yield box
        await box.close()


@pytest.fixture(scope="session")
def busybox_rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rootfs(tmp_path_factory.mktemp("rootfs") / "busybox")


@pytest.fixture
def agent(
    tmp_path: Path, nsexec_path: Path, busybox_rootfs: Path, request: pytest.FixtureRequest
) -> Iterator[RunningAgent]:
    """Start a fresh agent; at the end it stops on request, and leaves no mount, cgroup or file.

    Parametrized indirectly with v1 or v2, its containers are in cgroups of that version.
    """
    options = ["--cgroup", request.param] if hasattr(request, "param") else []
    running = RunningAgent(tmp_path, nsexec_path, busybox_rootfs, *options)
    yield running
    running.stop()
    check_nothing_is_left(running, tmp_path)


def check_nothing_is_left(running: RunningAgent, directory: Path) -> None:
    """Check everything that an agent must clean up before it exits."""
    assert not running.socket.exists()
    assert list(running.state.rglob("*")) == []
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()
    assert running.cgroups() == []
    assert "a bug in a handler" not in running.log.read_text()


@pytest.fixture(params=["python", "front"])
def oci(request: pytest.FixtureRequest, tmp_path: Path, nsexec_path: Path, front_path: Path) -> Iterator[Oci]:
    """Provide our command line with its own root; fail if anything is left behind."""
    become_subreaper()
    runtime = Oci(OURS, tmp_path / "root", nsexec_path, front_path if request.param == "front" else None)
    with reaping():
        yield runtime
        runtime.clear()


@pytest.fixture
def sleeper(tmp_path: Path, busybox_rootfs: Path) -> Path:
    return bundle(tmp_path / "sleeper", busybox_rootfs, "sleep", "1000")

"""Support tests of the agent: an agent on a Unix socket of this machine, and a busybox root to run things in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Awaitable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from caisson.agent.client import Agent, AgentError, Container, Process, default_spec
from caisson.agent.rpc.codes import StatusCode
from caisson.proto.kata1 import oci_pb2
from tests.support.unique import unique

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]

#: Timeout of anything here in seconds, on a busy machine.
TIMEOUT = 60.0


class RunningAgent:
    """An agent process and its working directory."""

    def __init__(
        self,
        directory: Path,
        nsexec: Path,
        rootfs: Path,
        *options: str,
        within: Sequence[str] = (),
        module: str = "caisson.agent",
    ) -> None:
        """`options` are extra ones; `within` is a command that runs another (unshare(1)); `module` is what to run."""
        self.socket = directory / "agent.sock"
        self.state = directory / "state"
        self.rootfs = rootfs
        self.log = directory / "log"
        self.cgroup_parent = unique("caisson-test")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*within, sys.executable, "-m", module, "--listen", f"unix:{self.socket}",
                 "--nsexec", str(nsexec),
                 "--state", str(self.state), "--log", "debug", "--cgroup-parent", self.cgroup_parent, *options],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert self.process.stdout is not None
        assert b"ready" in self.process.stdout.readline(), self.log.read_text()

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        self.process.terminate()
        try:
            assert self.process.wait(TIMEOUT) == 0
        finally:
            self.process.kill()  # a hang is a failure like any other
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()

    def connect(self) -> Agent:
        return Agent.connect(self.socket)

    def cgroups(self) -> list[Path]:
        """Return the cgroups it has created, including its parent."""
        found = []
        for root in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()):
            walk = os.walk(root / self.cgroup_parent)  # skips cgroups removed meanwhile, and those of others
            found += [Path(place) for place, _, _ in walk]
        return found

    def fds(self) -> int:
        """Return the number of its descriptors, without the socket and the pidfd of its fork server."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir())) - 2 * bool(self.fork_servers())

    def memory(self) -> int:
        """Return resident memory in bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * 4096

    def children(self) -> set[int]:
        """Return its children, without nsexec's fork server, which stays."""
        return self.all_children() - self.fork_servers()

    def all_children(self) -> set[int]:
        return set(map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()))

    def fork_servers(self) -> set[int]:
        """Return the pids of fork servers: at most one that is not about to exit."""
        found = set()
        for pid in self.all_children():
            with contextlib.suppress(OSError):  # it has exited
                if Path(f"/proc/{pid}/comm").read_text().strip() == "nsexec:server":
                    found.add(pid)
        return found

    def spec(self, *args: str, **options: Any) -> oci_pb2.Spec:
        return default_spec(str(self.rootfs), args, **options)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine; a hang is a failure."""
    return asyncio.run(asyncio.wait_for(work, TIMEOUT))


async def output(process: Process) -> bytes:
    """Return all of its standard output."""
    return b"".join([data async for data in process.stdout()])


async def errors(process: Process) -> bytes:
    """Return all of its standard error."""
    return b"".join([data async for data in process.stderr()])


async def sh(container: Container, script: str, **options: Any) -> Process:
    """Run a shell script in a container."""
    return await container.exec(["/bin/sh", "-c", script], env=["PATH=/bin"], **options)


async def refused(call: Awaitable[Any]) -> tuple[StatusCode, str]:
    """Return the status and text of a call that must fail."""
    try:
        await call
    except AgentError as error:
        return error.code, error.details
    raise AssertionError("the call should have failed")

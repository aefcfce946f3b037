"""Starting processes in containers: create, start and exec, by way of nsexec."""

from __future__ import annotations

from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import Protocol

    from agent.libcontainer.nsexec import Nsexec

    from agent.libcontainer.spec import Process, Spec
else:
    Protocol = object


class LaunchError(Exception):
    """A process that could not be started: `step`, `path` and `errno` say where; str() is the sentence for the user."""

    def __init__(self, message: str, *, step: str = "", path: str = "", errno: int = 0) -> None:
        super().__init__(message)
        self.step = step
        self.path = path
        self.errno = errno


class Child(Protocol):
    """A child process of the agent, until its end (agent/reaper.py)."""

    pid: int

    async def wait(self) -> int:
        """The exit status 0-255, or 128 + signal.  Any number of waiters."""
        ...


class Children(Protocol):
    """Who waits for children (agent/reaper.py)."""

    def expecting(self) -> AbstractContextManager[None]:
        """While inside, exit statuses of unknown pids are kept for claim()."""
        ...

    def claim(self, pid: int) -> Child:
        """From now on this pid's exit goes to the returned Child."""
        ...


@dataclass(frozen=True)
class Stdio:
    """File descriptors for the child's 0, 1 and 2; the caller closes them afterwards."""

    stdin: int
    stdout: int
    stderr: int


@dataclass(frozen=True)
class Launched:
    """A started process.  `console` is the master of its terminal (the caller owns it), iff it has one."""

    child: Child
    console: int | None


class Launcher:
    """Makes processes in containers.  `log(level, message, **fields)` gets nsexec's own lines.

    `patience` (seconds) bounds how long nsexec may take before it is killed.
    """

    def __init__(
        self, nsexec: Nsexec, children: Children, log: Callable[..., None], *, patience: float = 30.0
    ) -> None: ...

    async def create(
        self,
        spec: Spec,
        *,
        container_id: str,
        bundle: Path,
        rootfs: str,
        join: Mapping[str, str],
        cgroup: int | None,
        stdio: Stdio | None,
        fifo: Path,
    ) -> Launched: ...

    async def exec(
        self, process: Process, *, spec: Spec, init: Child, cgroup: int | None, stdio: Stdio | None
    ) -> Launched: ...

    async def start(self, fifo: Path, init: Child) -> None: ...

    def close(self) -> None: ...

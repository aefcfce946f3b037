"""One nsexec, from its spawn on: its stages, as far as they are known, and what is said with them."""

from __future__ import annotations

import asyncio
import os

from caisson.agent.libcontainer.process.channel import SetupChannel, kill

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from typing import Protocol
else:
    Protocol = object

CLEANUP_SECONDS = 5.0


class Child(Protocol):
    """A child process of the agent, until its end (agent/model/reaper.py)."""

    pid: int

    async def wait(self) -> int:
        """The exit status 0-255, or 128 + signal.  Any number of waiters."""
        ...


class Children(Protocol):
    """Who waits for children (agent/model/reaper.py)."""

    def expecting(self) -> AbstractContextManager[None]:
        """While inside, exit statuses of unknown pids are kept for claim()."""
        ...

    def claim(self, pid: int) -> Child:
        """From now on this pid's exit goes to the returned Child."""
        ...


class InitProcess:
    """One nsexec: its conversation and its stages, as far as they are known."""

    def __init__(self, children: Children, log: Callable[..., None], container_id: str, *, terminal: bool) -> None:
        self._children = children
        self.container_id = container_id
        self.stages: list[Child] = []
        self.child: Child | None = None
        self.pidfd0 = -1
        self.starts_by_socket = False  # it has no fifo to be started by
        self.start_seconds: float | None = 0.0  # what its program may take to be executed once it is started
        self.joined: Mapping[str, str] = {}  # namespaces that the first process joined, beyond its configuration's
        self.filter = b""  # of system calls, for every process of the container
        loop = asyncio.get_running_loop()
        self.channel = SetupChannel(
            loop,
            terminal=terminal,
            pids=self._on_pids,
            log=lambda level, message: log(level, message, container=container_id),
        )

    def spawned(self, pid: int) -> None:
        """Take note of stage 0.  No await since the spawn: the pid is still its own, even if it is dead."""
        self.pidfd0 = os.pidfd_open(pid)
        self.stages.append(self._children.claim(pid))
        self.channel.listen(pid)

    def _on_pids(self, stage1: int, stage2: int) -> None:
        if stage2 == 0:
            self.stages.append(self._children.claim(stage1))
        elif self.child is None:
            self.child = self._children.claim(stage2)

    async def destroy(self) -> None:
        """Kill what there is of it, wait for all of it, close everything."""
        if self.pidfd0 >= 0:
            kill(self.pidfd0)
        self.channel.kill_stages()
        known = [*self.stages, *([self.child] if self.child is not None else [])]
        # A stage that is not known by pid yet sees its maker's end and follows; the sync socket closes with the last.
        waits = [asyncio.ensure_future(child.wait()) for child in known]
        if waits:
            await asyncio.wait([self.channel.ended], timeout=CLEANUP_SECONDS)
            _, late = await asyncio.wait(waits, timeout=CLEANUP_SECONDS)
            for wait in late:
                wait.cancel()
        self.close()

    def close(self) -> None:
        """Close everything.  Idempotent."""
        self.channel.close()
        self.close_stage0()

    def close_stage0(self) -> None:
        """Forget stage 0, which has done its work."""
        if self.pidfd0 >= 0:
            os.close(self.pidfd0)
            self.pidfd0 = -1

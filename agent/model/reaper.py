"""The one owner of child processes: all waiting for exits happens here.

The agent is the parent of every container's processes, and as PID 1 or subreaper also of their orphans.  All of it runs
in the event loop's thread, which gives two guarantees without a lock: between a spawn and its ``claim`` nothing is
reaped if nothing is awaited, and a pid that was not reaped yet cannot have been reused, so signals reach only that
process.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import contextmanager

from caisson.agent.base import syscalls
from caisson.agent.base.errors import ProcessExited

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from caisson.agent.base.signals import Signals


class Child:
    """A child process, before and after its exit."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None
        self._callbacks: dict[object, Callable[[], object]] = {}

    async def wait(self) -> int:
        """Wait for the exit status, 0-255 or 128 + signal.  Any number of waiters, before and after its exit."""
        if self.status is None:
            ended = asyncio.Event()
            with self.on_exit(ended.set):
                await ended.wait()
        assert self.status is not None
        return self.status

    @contextmanager
    def on_exit(self, callback: Callable[[], object]) -> Iterator[None]:
        """Call a callback if it exits while the block runs."""
        key = object()
        self._callbacks[key] = callback
        try:
            yield
        finally:
            self._callbacks.pop(key, None)

    def signal(self, number: int) -> None:
        """Send a signal.  Raises ProcessExited when it was reaped, and OSError for an invalid number."""
        if self.status is not None:
            raise ProcessExited
        os.kill(self.pid, number)

    def _end(self, status: int) -> None:
        self.status = status
        for callback in list(self._callbacks.values()):
            callback()


class Reaper:
    """Reap all children, and pass each status to the claimant of its pid."""

    def __init__(self) -> None:
        self._children: dict[int, Child] = {}
        self._expecting = 0
        self._unclaimed: dict[int, int] = {}

    def start(self, signals: Signals) -> None:
        """Start reaping; orphans become children of this process from now on (PR_SET_CHILD_SUBREAPER, prctl(2))."""
        if os.getpid() != 1:
            syscalls.set_child_subreaper()
        signals.handle(signal.SIGCHLD, self._reap)
        self._reap()

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Keep exit statuses of unclaimed pids for ``claim``, while inside."""
        self._expecting += 1
        try:
            yield
        finally:
            self._expecting -= 1
            if not self._expecting:
                self._unclaimed.clear()

    def claim(self, pid: int) -> Child:
        """Route this pid's exit to the returned Child from now on."""
        child = Child(pid)
        status = self._unclaimed.pop(pid, None)
        if status is None or _is_child(pid):  # a kept status may be an earlier, unrelated process's with this number
            self._children[pid] = child
        else:
            child.status = status
        return child

    def _reap(self) -> None:
        while True:
            try:
                pid, wait_status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(wait_status)
            status = code if code >= 0 else 128 - code
            child = self._children.pop(pid, None)
            if child is not None:
                child._end(status)
            elif self._expecting:
                self._unclaimed[pid] = status


def _is_child(pid: int) -> bool:
    """Return whether there is an unreaped child with this pid."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True

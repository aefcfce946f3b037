"""Hearing that the kernel ended processes of a cgroup for want of memory."""

from __future__ import annotations

import asyncio
import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.libcontainer.cgroups.stats import Directory


def kills(files: Directory, name: str) -> int:
    """How many processes were ended so far, according to memory.events or memory.oom_control."""
    return files.table(name).get("oom_kill", 0)


class Changes:
    """Calls back whenever the kernel says that a file of a cgroup has changed, until its cgroup goes.

    Such a file is always readable; that it has changed is EPOLLPRI (cgroup-v2.rst, "poll and [id]notify events"),
    which an event loop does not wait for. An epoll of its own does, and is readable then for the loop.
    """

    def __init__(self, path: str, changed: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = changed
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._file, select.EPOLLPRI)
        self._loop.add_reader(self._epoll.fileno(), self._ready)

    def _ready(self) -> None:
        try:
            os.pread(self._file, 4096, 0)  # makes it quiet again
        except OSError:  # ENODEV: the cgroup is gone
            self.close()
            return
        self._changed()

    def close(self) -> None:
        """Hear no more.  Idempotent."""
        if self._file >= 0:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            os.close(self._file)
            self._file = -1


class Kills:
    """Calls back when a counter of killed processes has grown."""

    def __init__(self, count: Callable[[], int], killed: Callable[[], object]) -> None:
        self._count = count
        self._killed = killed
        self._known = count()

    def look(self) -> bool:
        """Whether there were more since the last look; whoever wants to know has been told then."""
        now = self._count()
        grown = now > self._known
        self._known = max(now, self._known)
        if grown:
            self._killed()
        return grown

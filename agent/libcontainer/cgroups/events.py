"""What the kernel says of a cgroup by itself: that a file has changed, that processes were ended for want of memory."""

from __future__ import annotations

import asyncio
import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from caisson.agent.libcontainer.cgroups.stats import Directory


def kills(files: Directory, name: str) -> int:
    """How many processes were ended so far, according to memory.events or memory.oom_control."""
    return files.table(name).get("oom_kill", 0)


class FileWatch:
    """Calls back whenever the kernel says that a file of a cgroup has changed, until its cgroup goes.

    Such a file is always readable; that it has changed is EPOLLPRI (cgroup-v2.rst, "poll and [id]notify events"),
    which an event loop does not wait for. An epoll of its own does, and is readable then for the loop.
    """

    def __init__(self, path: str, changed: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = changed
        self._epoll = select.epoll()
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._epoll.close()
            raise
        self._epoll.register(self._file, select.EPOLLPRI)
        self._loop.add_reader(self._epoll.fileno(), self._ready)

    def _ready(self) -> None:
        try:
            os.pread(self._file, 4096, 0)  # makes it quiet again
        except OSError:  # ENODEV: the cgroup is gone
            self.close()
        self._changed()

    def close(self) -> None:
        """Hear no more.  Idempotent."""
        if self._file >= 0:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            os.close(self._file)
            self._file = -1


class OomCounter:
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


class EventFdNotifier:
    """Looks at a cgroup of version 1 when the kernel says that it ran out of memory, until it is closed.

    The word comes by an eventfd, before anything was ended, and once more when the cgroup is removed
    (cgroup-v1/memory.rst, "OOM Control"): so `look`, which tells whether it found something, is called a few times.
    """

    AFTER = (0.0, 0.01, 0.1, 1.0)  # seconds

    def __init__(self, directory: str, look: Callable[[], bool]) -> None:
        from caisson.agent.libcontainer.cgroups import files

        self._loop = asyncio.get_running_loop()
        self._look = look
        self._timer: asyncio.TimerHandle | None = None
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            control = os.open(f"{directory}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
            try:
                files.write(f"{directory}/cgroup.event_control", f"{self._event} {control}")
            finally:
                os.close(control)
        except OSError:
            os.close(self._event)
            raise
        self._loop.add_reader(self._event, self._ready)

    def _ready(self) -> None:
        os.eventfd_read(self._event)
        self._try(0)

    def _try(self, attempt: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if attempt < len(self.AFTER) and not self._look():
            self._timer = self._loop.call_later(self.AFTER[attempt], self._try, attempt + 1)

    def close(self) -> None:
        """Hear no more.  Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._event >= 0:
            self._loop.remove_reader(self._event)
            os.close(self._event)
            self._event = -1

"""Kernel notifications about a cgroup: a file has changed, processes were OOM-killed.

Nothing here blocks: a watch has a descriptor, and its owner calls `on_readable` when that is readable.
"""

from __future__ import annotations

import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from caisson.agent.libcontainer.cgroups.stats import CgroupDirectory


def oom_kills(files: CgroupDirectory, name: str) -> int:
    """Count the processes killed so far, according to memory.events or memory.oom_control."""
    return files.table(name).get("oom_kill", 0)


class FileWatch:
    """Watch a cgroup file for changes, until its cgroup is removed.

    Such a file is always readable; a change is reported as EPOLLPRI (cgroup-v2.rst, "poll and [id]notify events"),
    which event loops do not wait for.  A nested epoll does, and becomes readable.
    """

    #: Seconds after which `on_timeout` is to be called; None for never.
    delay: float | None = None

    def __init__(self, path: str, changed: Callable[[], object]) -> None:
        """Raises OSError."""
        self._changed = changed
        self._epoll = select.epoll()
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._epoll.close()
            raise
        self._epoll.register(self._file, select.EPOLLPRI)

    def fileno(self) -> int:
        """Return a descriptor that is readable when the file has changed; -1 once its cgroup is gone."""
        return self._epoll.fileno() if self._file >= 0 else -1

    def on_readable(self) -> None:
        """Call back, and rearm the watch."""
        try:
            os.pread(self._file, 4096, 0)
        except OSError:  # ENODEV: the cgroup is gone
            self.close()
        self._changed()

    def on_timeout(self) -> None:
        """Do nothing: there is no timeout."""

    def close(self) -> None:
        """Stop watching.  Idempotent."""
        if self._file >= 0:
            self._epoll.close()
            os.close(self._file)
            self._file = -1


class OomCounter:
    """Call back when a counter of killed processes has grown."""

    def __init__(self, count: Callable[[], int], killed: Callable[[], object]) -> None:
        self._count = count
        self._killed = killed
        self._known = count()

    def check(self) -> bool:
        """Check the counter: call back, and return true, if it has grown since the last check."""
        now = self._count()
        grown = now > self._known
        self._known = max(now, self._known)
        if grown:
            self._killed()
        return grown


class EventFdNotifier:
    """Check a v1 cgroup whenever the kernel reports that it ran out of memory, until closed.

    The report arrives on an eventfd before anything is killed, and again when the cgroup is removed
    (cgroup-v1/memory.rst, "OOM Control"): so `check`, which returns whether it found something, is called a few times.
    """

    DELAYS = (0.0, 0.01, 0.1, 1.0)  # seconds

    def __init__(self, directory: str, look: Callable[[], bool]) -> None:
        """Raises OSError."""
        from caisson.agent.libcontainer.cgroups import files

        self._look = look
        self._attempt = len(self.DELAYS)
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

    @property
    def delay(self) -> float | None:
        """Seconds after which `on_timeout` is to be called; None for never."""
        return self.DELAYS[self._attempt] if self._attempt < len(self.DELAYS) else None

    def fileno(self) -> int:
        """Return a descriptor that is readable when the kernel reports something; -1 once closed."""
        return self._event

    def on_readable(self) -> None:
        """Check now, and again later if nothing has changed."""
        os.eventfd_read(self._event)
        self._attempt = 0
        self.on_timeout()

    def on_timeout(self) -> None:
        """Check again, after `delay`."""
        self._attempt = len(self.DELAYS) if self._look() else self._attempt + 1

    def close(self) -> None:
        """Stop watching.  Idempotent."""
        if self._event >= 0:
            os.close(self._event)
            self._event = -1


#: A watch for OOM kills in a cgroup.
OomWatch = FileWatch | EventFdNotifier

"""Watch files for being opened, and leave no descriptor to open any."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

IN_OPEN = 0x20


@contextmanager
def watch_opens(path: Path) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether the file was opened since its last call; O_PATH does not count.

    Source: inotify(7).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert fd >= 0 and libc.inotify_add_watch(fd, os.fsencode(path), IN_OPEN) >= 0

    def was_opened() -> bool:
        try:
            return bool(os.read(fd, 4096))
        except BlockingIOError:
            return False

    try:
        yield was_opened
    finally:
        os.close(fd)


@contextmanager
def no_descriptor_is_free() -> Iterator[None]:
    """Make everything that needs a descriptor fail with EMFILE."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)

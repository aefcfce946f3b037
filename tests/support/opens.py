"""Watch files for being opened."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

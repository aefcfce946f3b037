"""Logs of a guest as rings: of each, the last MiBs are kept, whatever the guest prints.

The writer (QEMU) goes on at its place in the file, so that a reader finds its own; what is older than the last MiBs is
punched out of the file and takes no space any more.  It reads as zeros, and no reader here goes there.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

#: Bytes of a log that are kept, and how much more may be there before it is trimmed.
MAX_LOG = 4 << 20
SLACK = 1 << 20

#: Seconds between two times that a log is trimmed: at a serial port's speed, that is a few MiB.
TRIM_INTERVAL = 2.0

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


class LogRing:
    """The logs of a VM."""

    def __init__(self, files: Sequence[Path], size: int = MAX_LOG) -> None:
        self._files = files
        self._size = size
        self._trimmed: dict[Path, int] = {}  # up to where
        self._fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        self._fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]

    def trim(self) -> None:
        """Punch out what is older than the last bytes; a file system that cannot keeps it."""
        for file in self._files:
            try:
                size = file.stat().st_size
                start = self._trimmed.get(file, 0)
                if size - start > self._size + SLACK:
                    self._punch(file, start, size - self._size)
            except OSError:
                pass

    def _punch(self, file: Path, start: int, end: int) -> None:
        descriptor = os.open(file, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._fallocate(descriptor, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, start, end - start)
            self._trimmed[file] = end
        finally:
            os.close(descriptor)


def ring_start(size: int) -> int:
    """Return where what is kept of a log of this size begins, in bytes."""
    return max(0, size - MAX_LOG)

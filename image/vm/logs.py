"""Logs of a guest: kept as rings, and followed as they grow.

Only the last MiBs of each log are kept, whatever the guest prints.  The writer (QEMU) continues at its offset, so that
readers keep theirs; older data is punched out of the file and takes no space.  It would read as zeros, but readers here
skip it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

#: Bytes of a log to keep, and how much it may exceed that before it is trimmed.
MAX_LOG = 4 << 20
SLACK = 1 << 20

#: Seconds between trims: at a serial port's speed, a few MiB.
TRIM_INTERVAL = 2.0

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


class LogRing:
    """The logs of a VM."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._trimmed: dict[Path, int] = {}  # up to where
        import ctypes  # late: only a supervisor needs it

        self._fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        self._fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]

    def trim(self) -> None:
        """Punch out everything before the last bytes, if the file system supports it."""
        for file in self._files:
            try:
                size = file.stat().st_size
                start = self._trimmed.get(file, 0)
                if size - start > MAX_LOG + SLACK:
                    self._punch(file, start, size - MAX_LOG)
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
    """Return the offset of the kept part of a log of this size, in bytes."""
    return max(0, size - MAX_LOG)


#: Bytes to read and pass on at once.
BLOCK = 1 << 16


class Follower:
    """Pass data appended to a file to a callback: by `read`, or in a thread while a block runs and once more after it.

    A reader slower than the writer misses what the ring has dropped.  In a block the callback is not called again after
    an OSError: its output is closed.
    """

    #: Polling interval in seconds: inotify would save little, and the file may not exist yet.
    INTERVAL = 0.05

    def __init__(
        self, file: Path, callback: Callable[[bytes], None] | None, position: int = 0, interval: float = INTERVAL
    ) -> None:
        self._file = file
        self._interval = interval
        self._stream: IO[bytes] | None = None  # kept open: the last output is readable after removal
        self._callback = callback
        self.position = position
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="console", daemon=True)

    def _follow(self) -> None:
        while not self._stop.wait(self._interval):
            self._try_read()

    def _try_read(self) -> None:
        try:
            self.read()
        except OSError:
            self._callback = None

    def read(self) -> None:
        """Pass on what has been appended.  Raises OSError, if the callback does."""
        if self._callback is None:
            return
        if self._stream is None:
            try:
                self._stream = self._file.open("rb", buffering=0)
            except FileNotFoundError:
                return
        end = os.fstat(self._stream.fileno()).st_size  # do not get stuck in a flood
        while self.position < end:
            self.position = max(self.position, ring_start(os.fstat(self._stream.fileno()).st_size))
            self._stream.seek(self.position)
            data = self._stream.read(BLOCK)
            if not data:
                return
            self.position += len(data)
            self._callback(data)

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()

    def __enter__(self) -> None:
        if self._callback is not None:
            self._try_read()
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._thread.ident is not None:
            self._stop.set()
            self._thread.join()
            self._try_read()
        self.close()

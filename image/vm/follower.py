"""Follow a file that another process appends to: the console of a VM."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from caisson.image.vm.ring import ring_start

#: Bytes that are read, and handed on, at once.
BLOCK = 1 << 16


class Follower:
    """Hands what is appended to a file to a callback, in a thread, while the block runs and once more after it.

    A reader that is slower than the writer misses what the ring no longer has.  The callback is not called again after
    it has raised an OSError: where it writes to is closed.
    """

    #: Seconds between looks: inotify would save little, and the file may not be there yet.
    INTERVAL = 0.05

    def __init__(
        self, file: Path, callback: Callable[[bytes], None] | None, position: int = 0, interval: float = INTERVAL
    ) -> None:
        self._file = file
        self._interval = interval
        self._stream: IO[bytes] | None = None  # kept open: what was printed last is read when the file has gone
        self._callback = callback
        self.position = position
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="console", daemon=True)

    def _follow(self) -> None:
        while not self._stop.wait(self._interval):
            self._read_appended()

    def _read_appended(self) -> None:
        if self._callback is None:
            return
        if self._stream is None:
            try:
                self._stream = self._file.open("rb", buffering=0)
            except FileNotFoundError:
                return
        end = os.fstat(self._stream.fileno()).st_size  # a flood does not keep us here
        while self._callback is not None and self.position < end:
            self.position = max(self.position, ring_start(os.fstat(self._stream.fileno()).st_size))
            self._stream.seek(self.position)
            data = self._stream.read(BLOCK)
            if not data:
                return
            self.position += len(data)
            try:
                self._callback(data)
            except OSError:
                self._callback = None

    def __enter__(self) -> None:
        if self._callback is not None:
            self._read_appended()
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._thread.ident is not None:
            self._stop.set()
            self._thread.join()
            self._read_appended()
        if self._stream is not None:
            self._stream.close()

"""Following a file that somebody else writes: the console of a VM."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO


class Follower:
    """Hands what is appended to a file to a callback, in a thread, while the block runs and once more after it.

    The callback is not called again after it has raised an OSError: where it writes to is closed.
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
            self._look()

    def _look(self) -> None:
        if self._callback is None:
            return
        if self._stream is None:
            try:
                self._stream = self._file.open("rb")
            except FileNotFoundError:
                return
            self._stream.seek(self.position)
        if data := self._stream.read():
            self.position += len(data)
            try:
                self._callback(data)
            except OSError:
                self._callback = None

    def __enter__(self) -> None:
        if self._callback is not None:
            self._look()
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._thread.ident is not None:
            self._stop.set()
            self._thread.join()
            self._look()
        if self._stream is not None:
            self._stream.close()

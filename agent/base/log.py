"""Structured logging: one JSON object per line, on stderr (in a guest: the console) and to listeners.

Containers' payloads are never logged.  The standard library's logging is not used: importing it costs more of a boot
than writing all log lines of it.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LEVELS = ("trace", "debug", "info", "warning", "error", "fatal")


class Log:
    """Write lines of a level and above; ``bind`` adds fields to every line."""

    def __init__(
        self,
        level: str = "info",
        fields: dict[str, object] | None = None,
        fd: int = 2,
        listeners: list[Callable[[bytes], object]] | None = None,
    ) -> None:
        self.level = level
        self._threshold = LEVELS.index(level)
        self._fields = fields or {}
        self._fd = fd
        self.listeners = [] if listeners is None else listeners  # one list, shared by a log and all logs bound to it

    def bind(self, **fields: object) -> Log:
        """Return a log whose lines carry these fields as well."""
        return Log(self.level, {**self._fields, **fields}, self._fd, self.listeners)

    def enabled(self, level: str) -> bool:
        """Return whether lines of this level are written: check before computing costly fields."""
        return LEVELS.index(level) >= self._threshold

    def __call__(self, level: str, message: str, **fields: object) -> None:
        """Write a line if its level is enabled.  An error in writing it is ignored."""
        if not self.enabled(level):
            return
        import json  # late: it compiles patterns, and a guest sends its first response without logging

        line = {"time": round(time.time(), 6), "level": level, "msg": message, **self._fields, **fields}
        data = json.dumps(line, default=str).encode() + b"\n"
        try:
            os.write(self._fd, data)
        except OSError:
            pass
        for listener in self.listeners:
            listener(data)

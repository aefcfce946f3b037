"""Log lines: one JSON object each, on stderr (in a guest: the console).

Payloads of containers are never logged.  Not the standard library's logging: importing it costs more of a boot than
everything that is logged in it.
"""

from __future__ import annotations

import json
import os
import time

LEVELS = ("trace", "debug", "info", "warning", "error", "fatal")


class Log:
    """Writes lines of a level and above; ``bind`` adds fields to every line."""

    def __init__(self, level: str = "info", fields: dict[str, object] | None = None, fd: int = 2) -> None:
        self.level = level
        self._threshold = LEVELS.index(level)
        self._fields = fields or {}
        self._fd = fd

    def bind(self, **fields: object) -> Log:
        """A log whose lines carry these fields, too."""
        return Log(self.level, {**self._fields, **fields}, self._fd)

    def enabled(self, level: str) -> bool:
        """Whether lines of this level are written: asked before costly fields are made."""
        return LEVELS.index(level) >= self._threshold

    def __call__(self, level: str, message: str, **fields: object) -> None:
        """Write a line, if its level is enough.  A log that cannot be written to is nobody's failure."""
        if not self.enabled(level):
            return
        line = {"time": round(time.time(), 6), "level": level, "msg": message, **self._fields, **fields}
        try:
            os.write(self._fd, json.dumps(line, default=str).encode() + b"\n")
        except OSError:
            pass

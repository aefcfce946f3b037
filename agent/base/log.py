"""Log lines: one JSON object each, on stderr (in a guest: the console), and to whoever else listens.

Payloads of containers are never logged.  Not the standard library's logging: importing it costs more of a boot than
everything that is logged in it.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LEVELS = ("trace", "debug", "info", "warning", "error", "fatal")


class Log:
    """Writes lines of a level and above; ``bind`` adds fields to every line."""

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
        self.listeners = [] if listeners is None else listeners  # one list for a log and all that are bound to it

    def bind(self, **fields: object) -> Log:
        """A log whose lines carry these fields, too."""
        return Log(self.level, {**self._fields, **fields}, self._fd, self.listeners)

    def enabled(self, level: str) -> bool:
        """Whether lines of this level are written: asked before costly fields are made."""
        return LEVELS.index(level) >= self._threshold

    def __call__(self, level: str, message: str, **fields: object) -> None:
        """Write a line, if its level is enough.  A log that cannot be written to is nobody's failure."""
        if not self.enabled(level):
            return
        import json  # here: it compiles patterns, and a guest gets to its first answer without a line

        line = {"time": round(time.time(), 6), "level": level, "msg": message, **self._fields, **fields}
        data = json.dumps(line, default=str).encode() + b"\n"
        try:
            os.write(self._fd, data)
        except OSError:
            pass
        for listener in self.listeners:
            listener(data)

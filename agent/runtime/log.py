"""The log of a command: lines of logrus, which callers of runc read, in text or JSON.

An error goes to the log and, if the log is a file, also to standard error as a bare message.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

LEVELS = ("debug", "info", "warning", "error")
PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._/@^+")
ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Log:
    """Write lines to a file, or to standard error.

    `fd` is -1 for standard error; `json` chooses the format; without `debug`, lines of that level are dropped.
    """

    def __init__(self, fd: int = -1, *, json: bool = False, debug: bool = False) -> None:
        self._fd = fd
        self._json = json
        self.verbose = debug

    @classmethod
    def open(cls, path: str, *, json: bool, debug: bool) -> Log:
        """Append to a file, created with mode 0644.  Raises OSError."""
        fd = -1
        if path:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_SYNC | os.O_CLOEXEC, 0o644)
        return cls(fd, json=json, debug=debug)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __call__(self, level: str, message: str, **_: object) -> None:
        """Write one line; `message` may contain a container's text, and is escaped."""
        if level == "debug" and not self.verbose:
            return
        level = level if level in LEVELS else "error"
        _write(2 if self._fd < 0 else self._fd, self._line(level, message) + "\n")

    def error(self, message: str) -> None:
        """Report the failure of the command."""
        self("error", message)
        if self._fd >= 0:
            _write(2, message + "\n")

    def _line(self, level: str, message: str) -> str:
        now = rfc3339()
        if self._json:
            from json import dumps

            return dumps({"level": level, "msg": message, "time": now}, separators=(",", ":"))
        return f"time={quote(now)} level={level} msg={quote(message)}"


def _write(fd: int, line: str) -> None:
    data = line.encode("utf-8", "replace")
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError as error:
        if fd != 2:  # otherwise there is nowhere to report it
            _write(2, f"Failed to write to log, {(error.strerror or '').lower()}\n")


def quote(text: str) -> str:
    """Quote a value as logrus's text format does, unless it is a plain word."""
    if text and PLAIN.issuperset(text):
        return text
    return '"' + "".join(ESCAPES.get(c) or (c if c.isprintable() else f"\\x{ord(c):02x}") for c in text) + '"'


def rfc3339() -> str:
    """Return the time as RFC 3339 in the local zone, without fractions."""
    now = time.localtime()
    zone = time.strftime("%z", now)
    return time.strftime("%Y-%m-%dT%H:%M:%S", now) + ("Z" if zone == "+0000" else f"{zone[:3]}:{zone[3:]}")

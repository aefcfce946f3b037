"""Errors of starting a process, as messages for users."""

from __future__ import annotations

import os
from errno import EINVAL, ENOENT, ESRCH

#: Errors of pidfd_open(2) for a pid that is free, is now a thread's, or was never known (-1).
NO_PROCESS = (ESRCH, ENOENT, EINVAL)


class LaunchError(Exception):
    """A process that could not be started: `step`, `path` and `errno` say where; str() is the message for the user."""

    def __init__(self, message: str, *, step: str = "", path: str = "", errno: int = 0) -> None:
        # File names and output of hooks may be any bytes; a message is text.
        super().__init__(message.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        self.step = step
        self.path = path
        self.errno = errno


def reason(errno: int) -> str:
    """Return the error's description, uncapitalised as in runc and shells."""
    words = os.strerror(errno)
    return words[:1].lower() + words[1:]


def launch_error(step: str, path: str, errno: int, why: str) -> LaunchError:
    """Build the error for a report of nsexec; failed program lookups read exactly as runc's."""
    words = reason(errno) if errno else ""
    if step == "lookup":
        return LaunchError(_lookup(path, why, words), step=step, path=path, errno=errno)
    if step == "execve":
        return LaunchError(f"exec {path}: {words}", step=step, path=path, errno=errno)
    if step == "cwd" and not why:
        return LaunchError(f'working directory "{path}": {words}', step=step, path=path, errno=errno)
    where = f"error running {step}: {path}" if " hook #" in step else f"{step} {path}".strip()
    if step == "mount":
        where = f"error mounting {path}"
    if " hook #" in step:  # C's signal descriptions begin with a capital
        said, name = why[:8], why[8:]
        why = said + name[:1].lower() + name[1:] if said == "signal: " else why
    detail = f"{why} ({words})" if why and words else why or words
    return LaunchError(f"{where}: {detail}", step=step, path=path, errno=errno)


def _lookup(program: str, why: str, words: str) -> str:
    if why == "path":
        return f'exec: "{program}": executable file not found in $PATH'
    if why == "stat":
        return f'exec: "{program}": stat {program}: {words}'
    return f'exec: "{program}": {words}'

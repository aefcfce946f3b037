"""Keep the reason why a VM exited: its user may not be its starter, and its directory is gone.

<cache>/ended/<directory>     kept for a day, or until a VM of this name is started; slashes of its path are "%2F"
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from caisson.image.build.cache import default_root
from caisson.image.vm.directory import VMDirectory

#: Reasons of intended exits.
STOPPED = "it was stopped"
POWERED_OFF = "the guest has powered off"

#: How other reasons name a VM's processes.
TITLES = {"qemu": "QEMU", "vsock": "the vsock device"}

#: Seconds to keep a reason.
MAX_AGE = 86400.0

#: Maximum number to keep: each command that boots its own VM leaves one.
MAX_STORED = 100

#: Maximum bytes of one: a reason includes the last lines of a guest's console.
MAX_BYTES = 64 << 10


def record(directory: VMDirectory, reason: str) -> None:
    """Store why a VM has exited, and remove old or excess reasons.  Best effort: a full disk is not an error."""
    file = _file(directory)
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        stored = sorted((old.stat().st_mtime, old) for old in file.parent.iterdir())
        for when, old in stored:
            if when < time.time() - MAX_AGE or (when, old) in stored[:-MAX_STORED]:
                old.unlink(missing_ok=True)
        file.write_text(reason[:MAX_BYTES])


def clear(directory: VMDirectory) -> None:
    """Remove the stored reason: a new VM of this name starts."""
    with contextlib.suppress(OSError):
        _file(directory).unlink()


def read(directory: VMDirectory) -> str:
    """Return the stored reason with its evidence; empty if there is none."""
    try:
        with _file(directory).open(errors="replace") as stream:
            return stream.read(MAX_BYTES)
    except OSError:
        return ""


def describe(directory: VMDirectory) -> str:
    """Describe when and why the last VM of this name exited; empty if unknown or intended."""
    try:
        age = time.time() - _file(directory).stat().st_mtime
    except OSError:
        return ""
    reason = read(directory)
    if age > MAX_AGE or reason.startswith((STOPPED, POWERED_OFF)):
        return ""
    return f"the last one ended {age:.0f} s ago: {reason}"


def _file(directory: VMDirectory) -> Path:
    return default_root() / "ended" / str(directory.path).replace("%", "%25").replace("/", "%2F")

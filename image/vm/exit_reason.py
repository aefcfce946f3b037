"""Keep why a detached VM has ended: nobody was there to be told, and its directory is gone.

<cache>/ended/<digest>-<name>     kept for a day, or until a VM of this name is started; the digest is of its run root
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from caisson.image.build.cache import default_root, digest_of
from caisson.image.vm.directory import VMDirectory

#: Seconds for which a reason is kept.
MAX_AGE = 86400.0

#: Bytes of one: a reason comes with the last lines of a guest's console.
MAX_BYTES = 64 << 10


def record(directory: VMDirectory, reason: str) -> None:
    """Store why a VM has ended, and remove what is too old.  Best effort: a full disk is no error here."""
    file = _file(directory)
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in file.parent.iterdir():
            if old.stat().st_mtime < time.time() - MAX_AGE:
                old.unlink(missing_ok=True)
        file.write_text(reason[:MAX_BYTES])


def clear(directory: VMDirectory) -> None:
    """Remove the stored reason: a new VM of this name begins."""
    with contextlib.suppress(OSError):
        _file(directory).unlink()


def describe(directory: VMDirectory) -> str:
    """Return when and why the last VM of this name has ended, a sentence and the evidence; empty if not known."""
    file = _file(directory)
    try:
        when = file.stat().st_mtime
        with file.open(errors="replace") as stream:
            reason = stream.read(MAX_BYTES)
    except OSError:
        return ""
    age = time.time() - when
    return f"the last one ended {age:.0f} s ago: {reason}" if age < MAX_AGE else ""


def _file(directory: VMDirectory) -> Path:
    return default_root() / "ended" / f"{digest_of(str(directory.path.parent))}-{directory.name}"

"""Why a VM that ran in the background has ended: nobody was there to be told, and its directory has gone.

<cache>/ended/<digest>-<name>     kept for a day, or until a VM of this name is started; the digest is of where it ran
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from caisson.image.build.cache import default_root, digest_of
from caisson.image.vm.directory import VMDirectory

#: Seconds that they are kept.
KEPT = 86400.0


def _file(directory: VMDirectory) -> Path:
    return default_root() / "ended" / f"{digest_of(str(directory.path.parent))}-{directory.name}"


def keep(directory: VMDirectory, why: str) -> None:
    """Keep what is to be said of a VM; fine when that is not possible."""
    file = _file(directory)
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in file.parent.iterdir():
            if old.stat().st_mtime < time.time() - KEPT:
                old.unlink(missing_ok=True)
        file.write_text(why)


def forget(directory: VMDirectory) -> None:
    """A new VM of this name begins."""
    with contextlib.suppress(OSError):
        _file(directory).unlink()


def of(directory: VMDirectory) -> str:
    """When and why the last VM of this name has ended, in a sentence and the evidence for it; else nothing."""
    file = _file(directory)
    try:
        when, why = file.stat().st_mtime, file.read_text()
    except OSError:
        return ""
    ago = time.time() - when
    return f"the last one ended {ago:.0f} s ago: {why}" if ago < KEPT else ""

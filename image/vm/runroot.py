"""The run root: the directory of all VMs, which no other user may be able to modify.

Files below it are used as agents' sockets, read as VMs' consoles, and removed when stale: so it must be this user's
own, and so must every directory and link on the path to it that could be replaced.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from caisson.image.vm.errors import VMError

#: Maximum links in a path (the same as in path_resolution(7)).
MAX_LINKS = 40

ANOTHER = "set CAISSON_RUN to another directory"


def run_root() -> Path:
    """Return the directory of VMs: ``$CAISSON_RUN``, ``$XDG_RUNTIME_DIR/caisson``, ``/run/caisson``, /tmp/caisson-UID.

    Absolute, but unresolved: ``owned_run_root`` checks links in it.
    """
    if chosen := os.environ.get("CAISSON_RUN"):
        return Path.cwd() / chosen
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and _is_mine(Path(base)):  # su(1) keeps another user's in the environment
        return Path(base) / "caisson"
    return Path("/run/caisson") if os.geteuid() == 0 else Path(f"/tmp/caisson-{os.geteuid()}")


def owned_run_root(make: bool = False) -> Path | None:
    """Return the run root without links; None if it does not exist; ``make`` creates it, private to its owner.

    Raises VMError if another user could replace it, or write in it.
    """
    root = run_root()
    try:
        if make:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = _resolved(root)
        state = path.lstat()
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        raise VMError(f"{root} cannot be used: {getattr(error, 'strerror', None) or error}; {ANOTHER}") from error
    if not stat.S_ISDIR(state.st_mode):
        raise VMError(f"{root}: is not a directory; {ANOTHER}")
    if state.st_uid != os.geteuid():
        raise VMError(f"{root}: belongs to another user; {ANOTHER}")
    if state.st_mode & 0o022:
        raise VMError(f"{root}: is writable by others; run: chmod go-w {root}")
    return path


def _resolved(path: Path) -> Path:
    """Resolve the links of a path, one by one.  Raises VMError if another user could redirect it.

    That is the case if a directory on the path, or a link, belongs to neither root nor us, or a non-sticky directory is
    writable by others (in a sticky one they cannot replace our files).
    """
    trusted = {0, os.geteuid(), Path("/").lstat().st_uid}  # the last: root, as seen in a user namespace
    done, parts, links = Path("/"), list(path.parts[1:]), 0
    while parts:
        state = done.lstat()
        open_to_others = state.st_mode & 0o022 and not state.st_mode & stat.S_ISVTX
        if state.st_uid not in trusted or (open_to_others and not _is_our_group(state)):
            raise VMError(f"{path}: others can replace files in {done}; {ANOTHER}")
        part = parts.pop(0)
        if part == "..":
            done = done.parent
            continue
        step = done / part
        state = step.lstat()
        if not stat.S_ISLNK(state.st_mode):
            done = step
            continue
        if state.st_uid not in trusted:
            raise VMError(f"{path}: {step} is another user's link; {ANOTHER}")
        links += 1
        if links > MAX_LINKS:
            raise VMError(f"{path}: too many links; {ANOTHER}")
        target = Path(os.readlink(step))  # noqa: PTH115 - Path.readlink() is the same, and this is beside lstat
        parts = [*target.parts[target.is_absolute() :], *parts]
        if target.is_absolute():
            done = Path("/")
    return done


def _is_mine(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid()
    except OSError:
        return False


def _is_our_group(state: os.stat_result) -> bool:
    """Return whether only root's or this user's own group, usually of one member, may write."""
    return state.st_gid in (0, os.getegid()) and not state.st_mode & 0o002

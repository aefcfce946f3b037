"""A host's queries about volumes: usage, files left in them, and swap."""

from __future__ import annotations

import os
import stat

from caisson.agent.base import syscalls
from caisson.agent.base.errors import InvalidArgument, SystemCallFailed, reason
from caisson.agent.base.mountinfo import mount_points
from caisson.proto.contract import GUEST_SHARED
from caisson.proto.record import Record


class Usage(Record):
    """Of bytes, or of inodes."""

    available: int
    total: int
    used: int


def usage(path: str) -> tuple[Usage, Usage]:
    """Return bytes and inodes of the file system at a path (statvfs(3)).  Raises SystemCallFailed."""
    try:
        fs = os.statvfs(path)
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else "is not a path"
        raise SystemCallFailed(f"{path}: {why}") from error
    size = fs.f_frsize
    return (
        Usage(fs.f_bfree * size, fs.f_blocks * size, (fs.f_blocks - fs.f_bfree) * size),
        Usage(fs.f_ffree, fs.f_files, fs.f_files - fs.f_ffree),
    )


def refresh_shares(directory: str = GUEST_SHARED) -> None:
    """Stat every mount of the shared directory: the kernel asks the host, and drops those that are gone.

    Only then does the host's virtiofsd release a directory.
    """
    for path in mount_points(directory):
        try:
            os.stat(path)  # noqa: PTH116 - no pathlib at start
        except OSError:
            continue  # the lookup was the point


def read_head(path: str, size: int) -> bytes:
    """Return the first bytes of a file; empty if it does not exist.

    A container may have created it: no symbolic link is followed, and nothing that could block is opened.  Raises
    SystemCallFailed.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
    resolve = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
    try:
        fd = syscalls.openat2(-100, path, flags, resolve=resolve)  # AT_FDCWD
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise SystemCallFailed(f"{path}: {reason(error)}") from error
    try:
        return os.read(fd, size) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)


def swap_on(path: str) -> None:
    """Swap to a block device (swapon(2)), which mkswap(8) has prepared.  Raises InvalidArgument or SystemCallFailed."""
    try:
        if not path.startswith("/dev/") or not stat.S_ISBLK(os.stat(path).st_mode):  # noqa: PTH116
            raise InvalidArgument(f"{path}: is not a block device of the guest")
        syscalls.swapon(path)
    except OSError as error:
        raise SystemCallFailed(f"Could not swap to {path}: {reason(error)}") from error

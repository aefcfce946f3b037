"""The group that a pod's volumes belong to (fsGroup of Kubernetes' PodSecurityContext).

A volume's contents are untrusted: no symbolic link is followed, and each file is changed through its descriptor.
"""

from __future__ import annotations

import errno
import os
import stat

from caisson.agent.base import syscalls
from caisson.agent.base.errors import SystemCallFailed, reason
from caisson.agent.guest.storage.mounts import open_point

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.guest.storage.storages import FsGroup

READ_WRITE, READ_ONLY = 0o660, 0o440
DIRECTORY_BITS = 0o110 | stat.S_ISGID

#: Maximum nesting of directories; a deeper path cannot be used anyway (PATH_MAX).
MAX_DEPTH = 400


def give_to_group(path: str, group: FsGroup, *, read_only: bool) -> None:
    """Give a mounted file system to a group, which may then read and, unless it is read-only, write all of it.

    With the policy OnRootMismatch, nothing is done if its root is already correct.  Raises SystemCallFailed.
    """
    mode = READ_ONLY if read_only else READ_WRITE
    try:
        root = open_point(path, 0o755, directory=os.path.isdir(path))  # noqa: PTH112 - no pathlib at start
        try:
            status = os.fstat(root)
            wanted = mode | DIRECTORY_BITS
            if group.only_on_mismatch and status.st_gid == group.gid and status.st_mode & wanted == wanted:
                return
            _change(root, group.gid, mode, MAX_DEPTH)
        finally:
            os.close(root)
    except OSError as error:
        raise SystemCallFailed(f"Could not give {path} to group {group.gid}: {reason(error)}") from error


def _change(fd: int, gid: int, mode: int, depth: int) -> None:
    """Change one file, after all that is below it."""
    status = os.fstat(fd)
    if stat.S_ISLNK(status.st_mode):
        return
    place = f"/proc/self/fd/{fd}"
    if stat.S_ISDIR(status.st_mode):
        if not depth:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        for name in os.listdir(place):  # noqa: PTH208
            inner = syscalls.openat2(
                fd, name, os.O_PATH | os.O_NOFOLLOW, resolve=syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_XDEV
            )
            try:
                _change(inner, gid, mode, depth - 1)
            finally:
                os.close(inner)
        mode |= DIRECTORY_BITS
    os.chown(place, -1, gid)
    os.chmod(place, stat.S_IMODE(status.st_mode) | mode)  # noqa: PTH101

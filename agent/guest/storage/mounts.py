"""Mount points in the guest: created, mounted and unmounted without following symbolic links.

Containers may have been able to write there, so each is accessed through a descriptor (openat2(2),
RESOLVE_NO_SYMLINKS).
"""

from __future__ import annotations

import os
import stat

from caisson.agent.base import syscalls
from caisson.agent.base.errors import MissingArgument, SystemCallFailed, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from caisson.agent.guest.storage.storages import Storage

#: Options of fstab(5) that are flags of mount(2); all others are passed to the file system.
FLAGS = {
    "ro": 0x1, "nosuid": 0x2, "nodev": 0x4, "noexec": 0x8, "sync": 0x10, "remount": 0x20, "mand": 0x40,
    "dirsync": 0x80, "noatime": 0x400, "nodiratime": 0x800, "bind": 0x1000, "rbind": 0x5000, "silent": 0x8000,
    "acl": 0x10000, "relatime": 0x200000, "iversion": 0x800000, "strictatime": 0x1000000, "lazytime": 0x2000000,
    "rw": 0, "defaults": 0, "async": 0, "atime": 0, "dev": 0, "diratime": 0, "exec": 0, "loud": 0, "noiversion": 0,
    "nolazytime": 0, "nomand": 0, "norelatime": 0, "nostrictatime": 0, "suid": 0,  # the default
}  # fmt: skip
PROPAGATION = {
    "unbindable": 1 << 17, "private": 1 << 18, "slave": 1 << 19, "shared": 1 << 20,
    "runbindable": 1 << 17 | 0x4000, "rprivate": 1 << 18 | 0x4000, "rslave": 1 << 19 | 0x4000,
    "rshared": 1 << 20 | 0x4000,
}  # fmt: skip
#: File systems whose source is not a path.
NAMED_BY_A_TAG = ("9p", "virtiofs", "tmpfs", "hugetlbfs", "overlay")


def open_point(path: str, mode: int, *, directory: bool = True) -> int:
    """Open a mount point with O_PATH, creating it and its parents if missing.

    Raises OSError; ELOOP if a component is a symbolic link.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not path.startswith("/") or not parts or ".." in parts:
        raise OSError(22, os.strerror(22), path)
    at = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for number, name in enumerate(parts):
        last = number == len(parts) - 1
        is_file = last and not directory
        try:
            try:
                if is_file:
                    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=at))
                else:
                    os.mkdir(name, mode if last else 0o755, dir_fd=at)
                    if last:
                        os.chmod(name, mode, dir_fd=at, follow_symlinks=True)
            except FileExistsError:
                pass
            flags = os.O_PATH | (0 if is_file else os.O_DIRECTORY)
            inner = syscalls.openat2(at, name, flags, resolve=syscalls.RESOLVE_NO_SYMLINKS)
        finally:
            os.close(at)
        at = inner
    return at


def make_directory(path: str, mode: int = 0o755) -> None:
    """Create a directory and its parents.  Raises SystemCallFailed."""
    try:
        os.close(open_point(path, mode))
    except OSError as error:
        raise SystemCallFailed(f"Could not create {path}: {reason(error)}") from error


def mount(storage: Storage) -> None:
    """Mount a storage whose source is one for mount(2).  Raises MissingArgument or SystemCallFailed."""
    source, target, fstype = storage.source, storage.mount_point, storage.fstype
    for value, what in ((source, "source"), (target, "destination"), (fstype, "FS type")):
        if not value:
            raise MissingArgument(f"need mount {what}")
    flags, propagation, data = parse_options(storage.options)
    if fstype == "bind":
        flags |= FLAGS["bind"]
    if fstype not in NAMED_BY_A_TAG and source.startswith("/"):
        try:
            source = os.path.realpath(source, strict=True)
        except OSError:
            raise SystemCallFailed(f"Could not resolve symlink for source {source}") from None
    directory = fstype != "bind" or os.path.isdir(source)  # noqa: PTH112 - no pathlib at start
    try:
        point = open_point(target, 0o755, directory=directory)
    except OSError as error:
        raise SystemCallFailed(f"Could not create destination mount point: {target}: {reason(error)}") from error
    place = f"/proc/self/fd/{point}"
    try:
        syscalls.mount(source, place, fstype, flags & ~(FLAGS["ro"] if flags & FLAGS["bind"] else 0), data or None)
        try:
            _set_attributes(target, flags, propagation)
        except OSError:
            unmount(target)
            raise
    except OSError as error:
        raise SystemCallFailed(f"Could not mount {source} to {target}: {reason(error)}") from error
    finally:
        os.close(point)


def _set_attributes(target: str, flags: int, propagation: list[int]) -> None:
    """Set what needs a separate call: attributes of a bind mount, and propagation (mount(2), "Notes")."""
    attributes = flags & (FLAGS["ro"] | FLAGS["nosuid"] | FLAGS["nodev"] | FLAGS["noexec"])
    if not (propagation or (flags & FLAGS["bind"] and attributes)):
        return
    mounted = open_point(target, 0o755, directory=os.path.isdir(target))  # noqa: PTH112
    try:
        place = f"/proc/self/fd/{mounted}"
        if flags & FLAGS["bind"] and attributes:
            syscalls.mount(None, place, None, syscalls.MS_REMOUNT | syscalls.MS_BIND | attributes)
        for kind in propagation:
            syscalls.mount(None, place, None, kind)
    finally:
        os.close(mounted)


def remount(target: str, options: Sequence[str]) -> None:
    """Change the options of the mount at a path (MS_REMOUNT).  Raises SystemCallFailed."""
    flags, _, data = parse_options(options)
    try:
        mounted = open_point(target, 0o755)
        try:
            place = f"/proc/self/fd/{mounted}"
            syscalls.mount(None, place, None, flags | syscalls.MS_REMOUNT, data or None)
        finally:
            os.close(mounted)
    except OSError as error:
        raise SystemCallFailed(f"Could not remount {target}: {reason(error)}") from error


def unmount(path: str) -> None:
    """Detach the mount at a path.  Raises OSError."""
    mounted = open_point(path, 0o755, directory=stat.S_ISDIR(os.lstat(path).st_mode))
    try:
        syscalls.umount2(f"/proc/self/fd/{mounted}", syscalls.MNT_DETACH)
    finally:
        os.close(mounted)


def parse_options(options: Sequence[str]) -> tuple[int, list[int], str]:
    """Split options into flags, propagation, and data for the file system."""
    flags, propagation, data = 0, [], []
    for option in options:
        if option in FLAGS:
            flags |= FLAGS[option]
        elif option in PROPAGATION:
            propagation.append(PROPAGATION[option])
        elif option:
            data.append(option)
    return flags, propagation, ",".join(data)


def option(options: Sequence[str], name: str) -> str:
    """Return the value of the option NAME=VALUE, empty if missing."""
    return next((one.partition("=")[2] for one in options if one.partition("=")[0] == name), "")

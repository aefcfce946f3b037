"""passwd(5) and group(5) of a container: resolved inside its root, regular files only, of limited size."""

from __future__ import annotations

import errno
import os
import stat

from caisson.agent.base import syscalls
from caisson.agent.libcontainer.config.reader import SpecError

FIELD = "process.user.username"
RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # not even a lease may block it (fcntl(2))
DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
FILE_MAX = 1 << 20  # bytes
PIECE = 1 << 14


class UserFiles:
    """The user database files of a root directory.

    With ``own``, the same directory as seen by this program, only files on its file system are read: a container can
    mount others that it serves itself (fuse(4)), and waiting for them could block.  Must be closed (or used in
    `with`).  Raises OSError if the directory does not exist.
    """

    def __init__(self, root: str, own: str = "") -> None:
        self._device = os.stat(own).st_dev if own else None  # noqa: PTH116 - no pathlib at start
        self._root = os.open(root, DIRECTORY)

    def __enter__(self) -> UserFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the directory."""
        os.close(self._root)

    def table(self, path: str, columns: int) -> list[list[str]]:
        """Return the lines with a full set of columns; none if there is no such regular file.

        Raises SpecError for a directory or a file that is too large; with ``own`` OSError if reading it might block.
        """
        try:
            fd = self._open(path)
        except OSError:
            if self._device is not None:
                raise
            fd = -1
        if fd < 0:
            return []
        data = _read(fd)
        if len(data) > FILE_MAX:
            raise SpecError(FIELD, f"the container's /{path} is larger than {FILE_MAX} bytes")
        text = data.decode(errors="surrogateescape")
        lines = (line.split(":") for line in text.splitlines() if "\0" not in line)  # it would terminate a variable
        return [line for line in lines if len(line) >= columns]

    def _open(self, path: str) -> int:
        """Return a descriptor, or -1 if there is no such regular file.  Raises SpecError for a directory, and OSError.

        Nothing else is opened for reading: opening a device can start it, and the device rules of the container, which
        can make nodes, do not apply here.
        """
        try:
            found = self._find(path)
        except FileNotFoundError:
            return -1
        try:
            if self._device is not None and syscalls.device_of(found) != self._device:
                raise OSError(errno.EXDEV, "is on another file system", path)
            kind = os.fstat(found).st_mode
            if stat.S_ISDIR(kind):
                raise SpecError(FIELD, f"the container's /{path} is a directory")
            return os.open(f"/proc/self/fd/{found}", FLAGS) if stat.S_ISREG(kind) else -1
        finally:
            os.close(found)

    def _find(self, path: str) -> int:
        """Return an O_PATH descriptor.  Raises OSError; with ``own`` also if the lookup would block."""
        if self._device is not None:
            return syscalls.openat2(self._root, path, os.O_PATH, resolve=RESOLVE | syscalls.RESOLVE_CACHED)
        try:
            return _find_plain(self._root, path)
        except FileNotFoundError:
            raise
        except OSError:  # probably a link
            return syscalls.openat2(self._root, path, os.O_PATH, resolve=RESOLVE)


def _read(fd: int) -> bytes:
    """Read a file up to slightly over the maximum size, and close it.  Raises OSError."""
    try:
        data = bytearray()
        while len(data) <= FILE_MAX and (piece := os.read(fd, PIECE)):
            data += piece
        return bytes(data)
    finally:
        os.close(fd)


def _find_plain(root: int, path: str) -> int:
    """Return an O_PATH descriptor for a path without links, sparing openat2 (ctypes).  Raises OSError."""
    directory, _, name = path.rpartition("/")
    at = os.open(directory, DIRECTORY | os.O_NOFOLLOW, dir_fd=root)
    try:
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)
    if stat.S_ISLNK(os.fstat(found).st_mode):
        os.close(found)
        raise OSError(errno.ELOOP, "is a symbolic link", path)
    return found

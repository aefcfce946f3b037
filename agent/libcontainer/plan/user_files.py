"""passwd(5) and group(5) of a container: resolved inside its root, regular files only, of limited size."""

from __future__ import annotations

import errno
import os
import stat

from caisson.agent.base import syscalls
from caisson.agent.libcontainer.config.reader import SpecError

FIELD = "process.user.username"
RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
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
        """Return the lines with a full set of columns; none if the file does not exist.

        Raises SpecError if it is not a regular file; with ``own`` OSError if reading it might block.
        """
        fd = self._open(path) if self._device is None else self._open_at_once(path)
        if fd < 0:
            return []
        kind = os.fstat(fd).st_mode
        if not stat.S_ISREG(kind):
            os.close(fd)  # open() fails for a directory, and does not close it
            if stat.S_ISDIR(kind):
                raise SpecError(FIELD, f"the container's /{path} is a directory")
            return []
        data = _read(fd)
        if len(data) > FILE_MAX:
            raise SpecError(FIELD, f"the container's /{path} is larger than {FILE_MAX} bytes")
        text = data.decode(errors="surrogateescape")
        lines = (line.split(":") for line in text.splitlines() if "\0" not in line)  # it would terminate a variable
        return [line for line in lines if len(line) >= columns]

    def _open(self, path: str) -> int:
        """Return a descriptor, or -1."""
        try:
            try:
                return _open_plain(self._root, path)
            except FileNotFoundError:
                return -1
            except OSError:  # probably a link
                return syscalls.openat2(self._root, path, FLAGS, resolve=RESOLVE)
        except OSError:
            return -1

    def _open_at_once(self, path: str) -> int:
        """Return a descriptor, or -1.  Raises OSError for another file system, or if opening would block."""
        try:
            found = syscalls.openat2(self._root, path, os.O_PATH, resolve=RESOLVE | syscalls.RESOLVE_CACHED)
        except FileNotFoundError:
            return -1
        try:
            if syscalls.device_of(found) != self._device:
                raise OSError(errno.EXDEV, "is on another file system", path)
            return os.open(f"/proc/self/fd/{found}", FLAGS | os.O_CLOEXEC)
        finally:
            os.close(found)


def _read(fd: int) -> bytes:
    """Read a file up to slightly over the maximum size, and close it.  Raises OSError."""
    try:
        data = bytearray()
        while len(data) <= FILE_MAX and (piece := os.read(fd, PIECE)):
            data += piece
        return bytes(data)
    finally:
        os.close(fd)


def _open_plain(root: int, path: str) -> int:
    """Open a file whose path has no links, without the cost of openat2 (ctypes).  Raises OSError."""
    directory, _, name = path.rpartition("/")
    at = os.open(directory, DIRECTORY | os.O_NOFOLLOW, dir_fd=root)
    try:
        return os.open(name, FLAGS | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)

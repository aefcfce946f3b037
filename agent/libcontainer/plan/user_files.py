"""passwd(5) and group(5) of a container: read inside its root whatever links say, only files, only up to a size."""

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
    """The files of a root directory that say who its users are.

    With ``own``, the same directory as this program has it, only files of its file system are read: a container can
    mount others, which it serves itself (fuse(4)) and which nobody may wait for.  To be closed (or used in `with`).
    Raises OSError if there is no such directory.
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
        """Return the lines that have all their columns; none if there is no such file.

        Raises SpecError for what is no such file; with ``own`` OSError where it might have to be waited for.
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
        lines = (line.split(":") for line in text.splitlines() if "\0" not in line)  # it would end a variable
        return [line for line in lines if len(line) >= columns]

    def _open(self, path: str) -> int:
        """Return a descriptor, or -1."""
        try:
            try:
                return _open_plain(self._root, path)
            except FileNotFoundError:
                return -1
            except OSError:  # a link, most likely
                return syscalls.openat2(self._root, path, FLAGS, resolve=RESOLVE)
        except OSError:
            return -1

    def _open_at_once(self, path: str) -> int:
        """Return a descriptor, or -1.  Raises OSError for another file system, and what the kernel has to ask for."""
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
    """Read a file up to a little over its greatest size, and close it.  Raises OSError."""
    try:
        data = bytearray()
        while len(data) <= FILE_MAX and (piece := os.read(fd, PIECE)):
            data += piece
        return bytes(data)
    finally:
        os.close(fd)


def _open_plain(root: int, path: str) -> int:
    """Open a file if no link is on the way, without the price of openat2 (ctypes).  Raises OSError."""
    directory, _, name = path.rpartition("/")
    at = os.open(directory, DIRECTORY | os.O_NOFOLLOW, dir_fd=root)
    try:
        return os.open(name, FLAGS | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)

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

    With ``shown``, the same root as the container's processes have it, a file is read only where they have the same:
    a container can mount file systems that it serves itself (fuse(4)) and that nobody may wait for, but only for
    itself.  To be closed (or used in `with`).  Raises OSError if there is no such directory.
    """

    def __init__(self, root: str, shown: str = "") -> None:
        self._root = os.open(root, DIRECTORY)
        self._shown = -1
        if shown:
            try:
                self._shown = os.open(shown, DIRECTORY)
            except OSError:
                self.close()
                raise

    def __enter__(self) -> UserFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the directories."""
        os.close(self._root)
        if self._shown >= 0:
            os.close(self._shown)

    def table(self, path: str, columns: int) -> list[list[str]]:
        """Return the lines that have all their columns; none if there is no such file.

        Raises SpecError for what is no such file; OSError where the container's processes have (or may have) another.
        """
        fd = self._open(path) if self._shown < 0 else self._open_shown(path)
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

    def _open_shown(self, path: str) -> int:
        """Return a descriptor, or -1.  Raises OSError if it is another file, or not in the kernel's cache, there."""
        try:
            # A container's mounts can come here, too, by propagation.
            fd = syscalls.openat2(self._root, path, FLAGS, resolve=RESOLVE | syscalls.RESOLVE_NO_XDEV)
        except FileNotFoundError:
            fd = -1
        try:
            if self._identity_shown(path) != _identity(fd):
                raise OSError(errno.ESTALE, "is another file in the container", path)
        except OSError:
            if fd >= 0:
                os.close(fd)
            raise
        return fd

    def _identity_shown(self, path: str) -> tuple[int, int, int] | None:
        try:
            fd = syscalls.openat2(self._shown, path, os.O_PATH, resolve=RESOLVE | syscalls.RESOLVE_CACHED)
        except FileNotFoundError:
            return None
        try:
            return syscalls.identity(fd)
        finally:
            os.close(fd)


def _identity(fd: int) -> tuple[int, int, int] | None:
    """Return what `syscalls.identity` returns, of a file that nobody can make slow."""
    if fd < 0:
        return None
    found = os.fstat(fd)
    return os.major(found.st_dev), os.minor(found.st_dev), found.st_ino


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

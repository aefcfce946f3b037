"""Open files below a directory that others may modify concurrently: by descriptors, without following links."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from caisson.image.errors import ImageError

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Beneath:
    """A directory of this machine, held by a descriptor.  Use in a `with` block, or close it.

    Paths are relative to it, without ".."; no component of one may be a symbolic link (openat(2), O_NOFOLLOW).
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._parent = b""  # the last opened directory: files are read directory by directory
        self._opened = -1

    @classmethod
    def of(cls, path: Path) -> Self:
        """Open a directory; a link in the user's own path is followed.  Raises OSError."""
        return cls(os.open(path, DIRECTORY & ~os.O_NOFOLLOW))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all descriptors.  Idempotent."""
        for descriptor in (self.descriptor, self._opened):
            if descriptor >= 0:
                os.close(descriptor)
        self.descriptor = self._opened = -1

    def directory(self, path: bytes) -> Self:
        """Open a directory below.  Raises OSError, ImageError for ".."."""
        descriptor = os.dup(self.descriptor)
        for part in path.split(b"/"):
            if part in (b"", b"."):
                continue
            if part == b"..":
                os.close(descriptor)
                raise ImageError(f"{os.fsdecode(path)}: leads out of the directory by '..'")
            try:
                below = os.open(part, DIRECTORY, dir_fd=descriptor)
            except OSError as error:
                error.filename = path
                raise
            finally:
                os.close(descriptor)
            descriptor = below
        return type(self)(descriptor)

    def open(self, path: bytes) -> int:
        """Open a file for reading; the caller checks its type.  Raises OSError, ImageError for ".."."""
        parent, _, name = path.rpartition(b"/")
        if self._opened < 0 or parent != self._parent:
            found = self.directory(parent)
            if self._opened >= 0:
                os.close(self._opened)
            self._parent, self._opened = parent, found.descriptor
        return os.open(name, FILE, dir_fd=self._opened)

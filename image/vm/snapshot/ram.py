"""A guest's memory as a file: copied with its holes, so that unused memory costs nothing; and a snapshot's files."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from caisson.image.vm.errors import VMError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

PAGE = 4096
BLOCK = 1 << 20

ZEROS = bytes(PAGE)

#: How often to look for a snapshot that is being replaced, and seconds between.
ATTEMPTS = 10
REPLACED_INTERVAL = 0.01


class SavedFiles:
    """A snapshot's memory and state, opened together.

    The snapshot may be replaced while a clone starts, which with the memory of one guest and the state of another would
    corrupt itself.
    """

    def __init__(self, snapshot: Path) -> None:
        """Open both.  Raises VMError."""
        self.name = snapshot.name
        for attempt in range(ATTEMPTS):
            try:
                self.memory, self.state = _opened(snapshot, "ram", "state")
                return
            except OSError as error:
                if not isinstance(error, FileNotFoundError) or attempt == ATTEMPTS - 1:
                    why = f"{error.strerror or error}; save it again: caisson save-snapshot {self.name}"
                    raise VMError(f"snapshot {self.name!r} cannot be opened: {why}") from error
            time.sleep(REPLACED_INTERVAL)

    def close(self) -> None:
        """Close both: open, a snapshot that was replaced takes room on the disk."""
        self.memory.close()
        self.state.close()


def _opened(directory: Path, *names: str) -> list[IO[bytes]]:
    """Open files of one directory, even if another one gets its name meanwhile.  Raises OSError."""
    parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.ExitStack() as opened:
            opener = partial(os.open, dir_fd=parent)
            files: list[IO[bytes]] = [
                opened.enter_context(open(name, "rb", buffering=0, opener=opener)) for name in names
            ]
            opened.pop_all()
            return files
    finally:
        os.close(parent)


@contextlib.contextmanager
def memory_file(mebibytes: int) -> Iterator[IO[bytes]]:
    """Create a memfd for a guest's memory."""
    with open(os.memfd_create("caisson-ram"), "r+b", buffering=0) as file:  # noqa: PTH123
        os.ftruncate(file.fileno(), mebibytes << 20)
        yield file


def fill(file: IO[bytes], saved: SavedFiles) -> None:
    """Copy the memory of a snapshot into a new one.  Raises VMError."""
    try:
        copy(saved.memory.fileno(), file.fileno())
    except OSError as error:
        raise VMError(f"snapshot {saved.name!r}: its memory cannot be copied: {error.strerror or error}") from error


def extents(descriptor: int) -> Iterator[tuple[int, int]]:
    """Yield where data, as opposed to holes, begins and ends in a file, in bytes (lseek(2), SEEK_DATA)."""
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole up to the end
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def copy(source: int, target: int) -> int:
    """Copy a file of memory into an empty one; returns the bytes of data.  Raises OSError."""
    os.ftruncate(target, os.fstat(source).st_size)
    copied = 0
    for start, end in extents(source):
        os.lseek(target, start, os.SEEK_SET)
        while start < end:
            sent = os.sendfile(target, source, start, end - start)
            if sent == 0:
                break  # it was truncated
            start += sent
            copied += sent
    return copied


def pack(source: int, target: int) -> int:
    """Copy like ``copy``, and turn zero pages into holes: many were used at some time."""
    os.ftruncate(target, os.fstat(source).st_size)
    copied = 0
    for start, end in extents(source):
        for position in range(start, end, BLOCK):
            data = memoryview(os.pread(source, min(BLOCK, end - position), position))
            for offset in range(0, len(data), PAGE):
                page = data[offset : offset + PAGE]
                if page != ZEROS[: len(page)]:
                    copied += os.pwrite(target, page, position + offset)
    return copied

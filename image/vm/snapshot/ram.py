"""A guest's memory as a file: copied with its holes, so that unused memory costs nothing; and a snapshot's files."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from caisson.image.vm.errors import VMError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Self

PAGE = 4096
BLOCK = 1 << 20

ZEROS = bytes(PAGE)

#: How often to look for a snapshot that is being replaced, and seconds between.
ATTEMPTS = 10
REPLACED_INTERVAL = 0.01


class SavedFiles:
    """A snapshot's memory and state, opened together: it may be replaced or removed while a clone of it starts, and
    the memory of one guest with the state of another is a guest that corrupts itself.
    """

    def __init__(self, snapshot: Path) -> None:
        """Raises VMError."""
        self.name = snapshot.name
        for attempt in range(ATTEMPTS):
            try:
                self.memory, self.state = _opened(snapshot, "ram", "state")
                return
            except OSError as error:
                if not isinstance(error, FileNotFoundError) or attempt == ATTEMPTS - 1:
                    raise VMError(f"snapshot {snapshot}: cannot be opened: {error.strerror or error}") from error
            time.sleep(REPLACED_INTERVAL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both: open, a snapshot that was replaced takes room on the disk."""
        self.memory.close()
        self.state.close()


def _opened(directory: Path, *names: str) -> list[IO[bytes]]:
    """Open files of one directory, even if another one gets its name meanwhile.  Raises OSError."""
    with contextlib.ExitStack() as stack:
        parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, parent)
        files: list[IO[bytes]] = []
        with contextlib.ExitStack() as opened:
            for name in names:
                descriptor = os.open(name, os.O_RDONLY, dir_fd=parent)
                files.append(opened.enter_context(open(descriptor, "rb", buffering=0)))  # noqa: PTH123
            opened.pop_all()
        return files


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
        raise VMError(f"the snapshot's memory cannot be copied: {error.strerror or error}") from error


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

"""A guest's memory as a file: copied with its holes, so that unused memory costs nothing."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from caisson.image.vm.errors import VMError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

PAGE = 4096
BLOCK = 1 << 20

ZEROS = bytes(PAGE)


@contextlib.contextmanager
def memory_file(mebibytes: int) -> Iterator[IO[bytes]]:
    """Create a memfd for a guest's memory."""
    with open(os.memfd_create("caisson-ram"), "r+b", buffering=0) as file:  # noqa: PTH123
        os.ftruncate(file.fileno(), mebibytes << 20)
        yield file


def fill(file: IO[bytes], snapshot: Path) -> None:
    """Copy the memory of a snapshot into a new one.  Raises VMError."""
    try:
        with (snapshot / "ram").open("rb") as saved:
            copy(saved.fileno(), file.fileno())
    except OSError as error:
        raise VMError(f"snapshot {snapshot}: its memory cannot be copied: {error.strerror or error}") from error


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

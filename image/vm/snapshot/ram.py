"""A guest's memory as a file: copied with its holes, so that what the guest never used costs nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

PAGE = 4096
BLOCK = 1 << 20

ZEROS = bytes(PAGE)


def extents(descriptor: int) -> Iterator[tuple[int, int]]:
    """What of a file is data, not holes: where it begins and ends, in bytes."""
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def copy(source: int, target: int) -> int:
    """Copy a file of memory into another, empty one; returns the bytes of data.  Raises OSError."""
    os.ftruncate(target, os.fstat(source).st_size)
    copied = 0
    for start, end in extents(source):
        os.lseek(target, start, os.SEEK_SET)
        while start < end:
            sent = os.sendfile(target, source, start, end - start)
            if sent == 0:
                break  # it has become shorter
            start += sent
            copied += sent
    return copied


def pack(source: int, target: int) -> int:
    """The same, and pages of zeros become holes, too: a guest has used many of them at some time."""
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

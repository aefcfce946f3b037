"""Tune glibc's allocator for a process that moves output in large blocks."""

from __future__ import annotations

#: Bytes of the largest block in regular use: 4 MiB of output and its framing.
LARGEST_BLOCK = 5 << 20


def raise_mmap_threshold() -> None:
    """Raise glibc's mmap threshold: otherwise each MiB of output is mapped, cleared and unmapped again.

    The threshold grows to the size of a freed block (mallopt(3), M_MMAP_THRESHOLD); the trim threshold follows at twice
    that size.  The block is never touched, so it costs nothing.
    """
    bytearray(LARGEST_BLOCK)

"""Memory of the C library's that is used again and again."""

from __future__ import annotations

#: Bytes of the largest blocks that are needed all the time: a MiB of output, and what goes with it.
LARGEST_BLOCK = 2 << 20


def keep() -> None:
    """Let glibc keep memory that is freed: else each MiB of output is mapped, cleared and unmapped anew.

    It learns from what is freed: blocks of up to that size come from the heap from then on, which keeps twice as much
    that is unused (mallopt(3), M_MMAP_THRESHOLD).  This one is never touched, so it costs nothing.
    """
    bytearray(LARGEST_BLOCK)

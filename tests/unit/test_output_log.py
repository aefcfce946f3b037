"""Test the bounds of the output that is kept of a process."""

from __future__ import annotations

import tracemalloc
from typing import Any

from caisson.agent.base.errors import EndOfStream
from caisson.agent.model.output_log import OutputLog, OutputPiece

MAX_BYTES = 100_000


class Trickle:
    """A process that writes single bytes."""

    has_terminal = True

    def __init__(self, count: int) -> None:
        self._left = count

    async def read_stdout(self, size: int) -> bytes:
        if not self._left:
            raise EndOfStream
        self._left -= 1
        return b"%d" % (self._left % 10)


async def test_output_in_small_pieces_takes_bounded_memory() -> None:
    process: Any = Trickle(3 * MAX_BYTES)
    tracemalloc.start()
    try:
        log = OutputLog(process, MAX_BYTES)
        entries: list[OutputPiece] = []
        ended = False
        while not ended:
            entries, ended = await log.read(0, follow=True)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 4 * MAX_BYTES, f"{len(entries)} pieces take {used} bytes"
    assert entries[-1].data == b"0" and entries[-1].number == 3 * MAX_BYTES - 1, "expected the tail"
    assert len(entries) > 100

"""Log lines on stderr at a bounded rate: a guest must not be able to fill the host's disk."""

from __future__ import annotations

import os
import sys
import time


class RateLimitedLog:
    """Write a line each time it is called: ``burst`` at once, then one a second; suppressed lines are counted."""

    def __init__(self, name: str, burst: int) -> None:
        self._name = name
        self._burst = float(burst)
        self._tokens = float(burst)
        self._then = time.monotonic()
        self._left_out = 0

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + now - self._then)
        self._then = now
        if self._tokens < 1:
            self._left_out += 1
            return
        self._tokens -= 1
        if self._left_out:
            text += f" (and {self._left_out} more lines that were left out)"
            self._left_out = 0
        try:
            sys.stderr.write(f"{self._name}: {text}\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            pass  # the reader is gone: no reason to drop the guest's connections


def describe(error: BaseException) -> str:
    """Format an exception on one line, with its location."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace else ""  # noqa: PTH119
    return f"{type(error).__name__}: {error}{place}"

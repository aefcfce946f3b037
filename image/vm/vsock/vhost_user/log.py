"""One line a problem on stderr, at a bounded rate: what a guest can provoke must not fill the host's disk."""

from __future__ import annotations

import sys
import time


class Log:
    """Callable that writes a line.  A burst of ``burst`` lines, then one a second; what was left out is counted."""

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
            text += f" (and {self._left_out} more problems that were not printed)"
            self._left_out = 0
        try:
            sys.stderr.write(f"{self._name}: {text}\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            pass  # nobody reads it any more: no reason to take the guest's connections down

"""Run fuzzers: for some seconds at every change, for ``CAISSON_FUZZ_SECONDS`` each if that is set (``-m fuzz``).

``CAISSON_FUZZ_SEED`` sets the seed of the random inputs; a failure names the seed and the round that found it.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

SECONDS = float(os.environ.get("CAISSON_FUZZ_SECONDS", "0"))
SEED = os.environ.get("CAISSON_FUZZ_SEED", "1")

#: Seconds a fuzzer's test may spend on everything but fuzzing, on a busy machine.
EXTRA = 330

#: Timeout of a fuzzer's test, in seconds.
LIMIT = SECONDS + EXTRA


def seconds(default: float) -> float:
    """Return for how many seconds to fuzz; the argument is the default at every change."""
    return SECONDS or default


def rounds(count: int) -> Iterator[AbstractContextManager[random.Random]]:
    """Yield a context with its own random generator for each round: at least this many, and until time is up."""
    until = time.monotonic() + SECONDS
    number = 0
    while number < count or time.monotonic() < until:
        yield _round(number)
        number += 1
    print(f"{number} rounds")


@contextlib.contextmanager
def _round(number: int) -> Iterator[random.Random]:
    try:
        yield random.Random(f"{SEED} {number}")
    except BaseException as error:
        error.add_note(f"found with CAISSON_FUZZ_SEED={SEED} in round {number}")
        raise

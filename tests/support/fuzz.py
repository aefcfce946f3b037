"""Fuzzers: some seconds each at every change, and ``CAISSON_FUZZ_SECONDS`` each where that is set (``-m fuzz``).

``CAISSON_FUZZ_SEED`` says which inputs chance makes; a failure names the seed and the round that found it.
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

#: Seconds that a fuzzer may take for all that is not fuzzing, on a busy machine.
EXTRA = 330

#: Seconds that a fuzzer's test may take.
LIMIT = SECONDS + EXTRA


def seconds(default: float) -> float:
    """Return how long a fuzzer looks, which takes so many seconds at every change."""
    return SECONDS or default


def rounds(count: int) -> Iterator[AbstractContextManager[random.Random]]:
    """Yield a context with chance of its own for each round: so many at least, and as long as there is time."""
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

"""The quick form of every benchmark: no row is more than half as bad again as its budget.  Which are met, it prints.

What is over that is measured again before it counts: the machine's other work comes and goes, and the two sides of a
ratio seldom meet it alike.
"""

from __future__ import annotations

import pytest

from tests.bench.__main__ import PARTS, measured
from tests.bench.rows import table
from tests.e2e.conftest import COMPILING

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(COMPILING)]

#: How often a budget may be used up, and what of it is not met (docs/performance.md says why): it is not to get worse.
FAR = 1.5
MISSED = {
    "boot to CreateSandbox's answer, own kernel, beside a C init (s)": 2.4,
    "boot to CreateSandbox's answer, Debian's kernel, beside a C init (s)": 2.2,
    "cp, 25 MB into a container, beside raw vsock and writing the file (s)": 4.5,
    "cp, 25 MB out of it, beside raw vsock and writing the file (s)": 4.5,
    "stdout by gRPC from the guest, beside raw vsock (ms/MiB)": 5.0,
    "docker run --rm true, beside a clone + 2 x runc (s)": 2.0,
}

TRIES = 3


def far_over(part: str) -> set[str]:
    rows = measured(part, quick=True)
    print("\n".join(table(rows)))
    missing = {row.what for row in rows if row.ours is None}
    return missing | {row.what for row in rows if row.excess and row.excess > MISSED.get(row.what, FAR)}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budgets of guests are those of emulation."""
    monkeypatch.setenv("CAISSON_ACCEL", "tcg")
    monkeypatch.setenv("CAISSON_VSOCK", "user")


@pytest.mark.parametrize("part", PARTS)
def test_no_row_is_far_over_its_budget(part: str) -> None:
    over = far_over(part)
    for _ in range(TRIES - 1):
        if over:
            over &= far_over(part)
    assert not over

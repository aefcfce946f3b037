"""One docker for all tests of the shim."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.shim.engine import Engine, engine


@pytest.fixture(scope="session")
def docker() -> Iterator[Engine]:
    """A docker with our runtime, beside runc."""
    with engine() as made:
        yield made
        assert made.vms() == [] and made.mounts() == []

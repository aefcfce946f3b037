"""Set up every test: compiled protocol modules, markers, and in CI without root a failure instead of a skip."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from caisson.proto import generate

generate.ensure()

# mke2fs, sfdisk and the like need no root for files, but Debian keeps them out of an ordinary user's PATH.
os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

# A shell's background jobs ignore it, and so would all programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: an example that takes long on a busy machine is not wrong.
with contextlib.suppress(ImportError):  # not installed in a guest that runs some of the tests (tests/nested)
    from hypothesis import settings

    settings.register_profile("without deadlines", settings(), deadline=None)
    settings.load_profile("without deadlines")

#: The directory whose tests are hermetic.
UNIT = Path(__file__).parent / "unit"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by directory, and deselect nightly tests unless requested."""
    for item in items:
        if item.path.is_relative_to(UNIT):
            item.add_marker(pytest.mark.quick)
    if "nightly" not in config.option.markexpr:
        night = {item for item in items if item.get_closest_marker("nightly")}
        config.hook.pytest_deselected(items=list(night))
        items[:] = [item for item in items if item not in night]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("this test needs root, and CI must have it", pytrace=False)
        pytest.skip("needs root")

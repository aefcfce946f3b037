"""What every test can count on: compiled protocol modules, and a failure (not a skip) in CI where root is missing."""

from __future__ import annotations

import os

import pytest

from caisson.proto import generate

generate.ensure()

# mke2fs, sfdisk and the like need no root for files, but Debian keeps them out of an ordinary user's PATH.
os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("this test needs root, and CI must have it", pytrace=False)
        pytest.skip("needs root")

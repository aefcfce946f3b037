"""Build Go programs that tests use as peers, from the module proxy, pinned by the go.sum beside each."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from caisson.image.programs import which


class Module:
    """A copy of a module's sources, in which to build it."""

    def __init__(self, sources: Path, build: Path) -> None:
        """Skips the test if Go is missing; fails it in CI."""
        go = which("go")
        if go is None:
            if os.environ.get("CI"):
                pytest.fail("this test needs Go, and CI must have it", pytrace=False)
            pytest.skip("needs Go")
        self._go = go
        self.path = build
        shutil.copytree(sources, build)

    def build(self, package: str, name: str) -> Path:
        """Build a package of the module, or of one that it requires; return the program."""
        environment = os.environ | {"GOFLAGS": "-mod=readonly", "GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}
        words = [self._go, "build", "-o", name, package]
        done = subprocess.run(words, cwd=self.path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return self.path / name

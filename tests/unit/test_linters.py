"""Test that the tree is linted, formatted and typed as set in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: What mypy checks: the packages, by import name.
CHECKED = [word for name in ("agent", "commands", "image", "proto") for word in ("-p", f"caisson.{name}")]


@pytest.mark.parametrize(
    "words",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy", *CHECKED, "-p", "tests", "-m", "tasks"]],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_a_linter_finds_nothing(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

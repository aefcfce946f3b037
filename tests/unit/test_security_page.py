"""Test SECURITY.md: each promise has a test, and each test named exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|\n ").split("|")]
    for line in (ROOT / "SECURITY.md").read_text().splitlines()
    if line.startswith("| ") and "`tests/" in line
]


def named(cell: str) -> list[tuple[str, str]]:
    """Return the files and functions in a row; `::name` alone is in the preceding file."""
    found = []
    file = ""
    for text in re.findall(r"`([^`]+)`", cell):
        path, _, name = text.partition("::")
        file = path or file
        found.append((file, name))
    return found


def functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_there_are_promises() -> None:
    assert len(ROWS) > 30
    assert all(len(row) == 2 and row[0] and named(row[1]) for row in ROWS)


@pytest.mark.parametrize("promise, tests", ROWS, ids=[row[0][:50] for row in ROWS])
def test_a_promise_names_tests_that_are_there(promise: str, tests: str) -> None:
    for file, name in named(tests):
        path = ROOT / file
        assert path.is_file() and path.name.startswith("test_"), f"{promise}: {file}"
        assert not name or name in functions(path), f"{promise}: {file} has no {name}"

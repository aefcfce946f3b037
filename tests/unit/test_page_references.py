"""Test that files and tests named in the docs exist: a promise without its test would be only a promise."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

#: `FILE`, `FILE::TEST` or `::TEST`, which is in the file named last.
REFERENCE = re.compile(r"`((?:agent|commands|image|proto|rootfs-templates|tests|\.ci|\.github)/[\w./-]*)?(?:::(\w+))?`")


def missing(text: str) -> list[str]:
    """Return a page's dangling references."""
    found, last = [], ""
    for path, test in REFERENCE.findall(text):
        last = path or last
        if not (ROOT / last).exists():
            found.append(last)
        elif test and test not in functions(last):
            found.append(f"{last}::{test}")
    return found


def functions(path: str) -> set[str]:
    """Return the names of a file's functions."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    assert missing(page.read_text()) == []


def test_a_test_that_is_not_there_is_found() -> None:
    assert missing("`tests/unit/test_plan.py`, `::test_nothing`") == ["tests/unit/test_plan.py::test_nothing"]

"""Test what `caisson test` makes pytest run: options that select tests."""

from __future__ import annotations

import pytest

from tests.commands import ROOT, selection


@pytest.mark.parametrize(
    ("quick", "nested", "words", "selected"),
    [
        (False, False, ["tests/e2e"], []),
        (True, False, ["-q"], ["-m", "quick", "tests/unit"]),
        (True, False, ["tests/unit/test_plan.py"], ["-m", "quick"]),
        (False, True, ["-m", "nested and nightly"], ["-s", "tests/nested"]),
    ],
)
def test_options_select_tests(quick: bool, nested: bool, words: list[str], selected: list[str]) -> None:
    assert selection(quick, nested, words) == selected


def test_nested_alone_selects_a_test_that_is_there() -> None:
    *_, mark, _, names = selection(False, True, [])
    assert mark == "nested and nightly"
    text = (ROOT / "tests/nested/test_nested.py").read_text()
    for name in names.split(" and "):
        assert name in text

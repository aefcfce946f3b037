"""Test every error that a user can see, read from the code: one line, `object: problem; remedy`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Where errors for users are raised, and their classes: main prints them without a traceback.
ROOMS = ("image", "agent/client", "commands")
ERRORS = {
    "CommandFailed", "CommandLineError", "ContainerUnavailable", "DefinitionError", "ImageError", "MissingPrograms",
    "InvalidOption", "OutputError", "UsageError", "VMError",
}  # fmt: skip

#: Maximum length of an object, where a placeholder counts as one letter.
MAX_OBJECT = 45

#: Wordings that no native speaker would use.
UNIDIOMATIC = re.compile(r"\bis no [a-z]+ that\b|\btold by\b|\bthis machine lacks\b|\binvoke \w|rpc error|\bcode = ")


def texts() -> Iterator[tuple[str, str]]:
    """Return each text with its place; placeholders are written as {}."""
    for file in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                function = node.exc.func
                name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
                text = written(node.exc.args[0])
                if name in ERRORS and text is not None:
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", text


def written(node: ast.expr) -> str | None:
    """Return the text of an expression, as far as it is constant."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (written(node.left) or "{}") + (written(node.right) or "{}")
    return None


def test_there_are_many() -> None:
    assert len(list(texts())) > 150


@pytest.mark.parametrize(("place", "text"), [pytest.param(*one, id=one[0]) for one in texts()])
def test_an_error_names_its_object_on_one_line(place: str, text: str) -> None:
    assert "\n" not in text, text
    what, colon, problem = text.partition(": ")
    assert colon and what and problem, text
    assert len(what) <= MAX_OBJECT and ";" not in what, text
    assert not text.endswith((".", ";", ":")), text
    assert not UNIDIOMATIC.search(text), text

"""Parse the project's own sources once, for tests of their structure."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: The directories that are packages of `caisson`.
PACKAGES = ("agent", "commands", "image", "proto")


@dataclass(frozen=True)
class Module:
    """A module by its name below `caisson`; a package's __init__ has the package's name."""

    name: str
    path: Path
    text: str

    @property
    def tree(self) -> ast.Module:
        return _parse(self.text)

    def imports(self) -> Iterator[str]:
        """Yield the full names of imported modules and members, including imports inside functions and for type
        checkers.
        """
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                origin = ".".join(part for part in (self._anchor(node.level), node.module) if part)
                yield from (f"{origin}.{alias.name}" for alias in node.names)

    def _anchor(self, level: int) -> str:
        """Return the package from which a relative import with so many dots starts."""
        parts = ["caisson", *self.name.split(".")]
        up = level - 1 if self.path.name == "__init__.py" else level
        return ".".join(parts[: len(parts) - up]) if level else ""

    def strings(self) -> Iterator[str]:
        """Yield the string constants in the code, f-strings in pieces; docstrings are not included."""
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                yield node.value


@functools.cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


@functools.cache
def modules() -> tuple[Module, ...]:
    """Return the modules of all packages, except those that protoc generates."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if not path.stem.endswith("_pb2"):
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                found.append(Module(name, path, path.read_text()))
    return tuple(found)


def within(module: str, package: str) -> bool:
    """Return whether a dotted name is the package or something in it."""
    return f"{module}.".startswith(f"{package}.")

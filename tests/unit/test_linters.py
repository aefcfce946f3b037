"""The tree is typed and formatted as pyproject.toml says, and imports run one way (design: tasks → image, agent.client;
agent.api → model → libcontainer, guest)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Modules that protoc makes: only who speaks a wire protocol needs them.
GENERATED = ("proto.caisson", "proto.kata1", "proto.kata3")

#: Packages and modules, and what nothing in them may import.  The longest name that fits a module is its rule.
FORBIDDEN = {
    "image": ("agent", "commands", "tasks", "tests"),
    "agent": ("image", "commands", "tasks", "tests", "agent.client", "agent.api"),
    "agent.__main__": ("image", "commands", "tasks", "tests", "agent.client"),
    "agent.services": ("image", "commands", "tasks", "tests", "agent.client"),  # the greater part of main
    "agent.api": ("image", "commands", "tasks", "tests", "agent.client"),
    "agent.rpc": ("image", "commands", "tasks", "tests", "agent.client", "agent.model"),
    "agent.client": ("image", "commands", "tasks", "tests", "agent.api"),
    "agent.base": (
        "agent.client",
        "agent.api",
        "agent.model",
        "agent.libcontainer",
        "agent.guest",
        "agent.rpc",
        "proto",
    ),
    "agent.libcontainer": ("agent.client", "agent.api", "agent.model", "agent.guest", "agent.rpc", *GENERATED, "grpc"),
    "agent.guest": (
        "image",
        "commands",
        "tasks",
        "tests",
        "agent.client",
        "agent.api",
        "agent.model.sandbox",
        *GENERATED,
        "grpc",
    ),
    "proto": ("agent", "image", "commands", "tasks", "tests"),
}

#: What mypy checks: the packages by the name that they are imported by.
CHECKED = [word for name in ("agent", "commands", "image", "proto") for word in ("-p", f"caisson.{name}")]


@pytest.mark.parametrize(
    "words",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy", *CHECKED, "-p", "tests", "-m", "tasks"]],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_a_linter_finds_nothing(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def imported(path: Path) -> Iterator[str]:
    """The modules that a file names in imports, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def under(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


@pytest.mark.parametrize("package", ["agent", "commands", "image", "proto"])
def test_imports_run_one_way(package: str) -> None:
    wrong = []
    for path in (ROOT / package).rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        rules = [name for name in FORBIDDEN if under(module, name)]
        bad = FORBIDDEN[max(rules, key=len)] if rules else ("tests", "tasks")
        for name in imported(path):
            assert name.split(".")[0] not in ("agent", "commands", "image", "proto"), (
                f"{module}: {name} without caisson."
            )
            wrong += [f"{module} imports {name}" for one in bad if under(name.removeprefix("caisson."), one)]
    assert wrong == []

"""Copy the project's sources, and run programs without what would lead back to this checkout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.support.source import ROOT

#: What a checkout has beside its sources: at its top, and anywhere.
NOT_AT_TOP = {".git", ".venv", "build", "dist"}
NOT_SOURCES = ("*.egg-info", "__pycache__", ".*_cache")
COMPILED = ("*_pb2.py", "*_pb2.pyi")


def copy_sources(target: Path, *, compiled: bool = False) -> None:
    """Copy what a fresh clone would have, and the protocol as it is compiled here if that is wanted."""
    matching = shutil.ignore_patterns(*NOT_SOURCES, *(() if compiled else COMPILED))

    def ignored(directory: str, names: list[str]) -> set[str]:
        return matching(directory, names) | (NOT_AT_TOP if Path(directory) == ROOT else set())

    shutil.copytree(ROOT, target, ignore=ignored)


def clean_environment() -> dict[str, str]:
    """Return this process's, without what would lead to the checkout, to another pytest or to this one's VMs."""
    foreign = ("PYTHON", "PYTEST", "VIRTUAL_ENV", "COV", "CAISSON_RUN")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}

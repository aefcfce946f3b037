"""Copy the project's sources, and run programs with nothing in the environment that refers to this checkout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.support.source import ROOT

#: Files in a checkout that are not sources: at its top, and anywhere.
NOT_AT_TOP = {".git", ".venv", "build", "dist"}
NOT_SOURCES = ("*.egg-info", "__pycache__", ".*_cache")
COMPILED = ("*_pb2.py", "*_pb2.pyi")


def copy_sources(target: Path, *, compiled: bool = False) -> None:
    """Copy the files a fresh clone would have, and optionally the protocol as compiled here."""
    matching = shutil.ignore_patterns(*NOT_SOURCES, *(() if compiled else COMPILED))

    def ignored(directory: str, names: list[str]) -> set[str]:
        return matching(directory, names) | (NOT_AT_TOP if Path(directory) == ROOT else set())

    shutil.copytree(ROOT, target, ignore=ignored)


def clean_environment() -> dict[str, str]:
    """Return this process's environment, without references to the checkout, to another pytest or to this one's VMs."""
    foreign = ("PYTHON", "PYTEST", "VIRTUAL_ENV", "COV", "CAISSON_RUN")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}

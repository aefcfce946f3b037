"""Set up other places to run in: the project's sources, a clean environment, and this machine's way to its mirrors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.support.source import ROOT

#: Files in a checkout that are not sources: at its top, and anywhere.
NOT_AT_TOP = {".git", ".venv", "build", "dist"}
NOT_SOURCES = ("*.egg-info", "__pycache__", ".*_cache")
COMPILED = ("*_pb2.py", "*_pb2.pyi")

#: How this machine reaches its mirrors.
MIRROR_SETTINGS = ("/etc/apt/apt.conf.d", "/etc/pip.conf", "/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt")


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


def copy_mirror_settings(root: Path) -> None:
    """Give another root file system this machine's settings of apt and pip, its name servers and certificates."""
    for way in map(Path, MIRROR_SETTINGS):
        there = root / way.relative_to("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        if way.is_dir():
            shutil.copytree(way, there, dirs_exist_ok=True)
        elif way.exists():
            shutil.copyfile(way, there)

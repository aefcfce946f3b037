"""Unpack archives made by tests."""

from __future__ import annotations

import subprocess
from pathlib import Path


def unpacked(archive: bytes, directory: Path) -> Path:
    """Unpack a tar archive unchanged into a new directory, and return the directory.

    Uses tar(1): Debian 12's Python lacks tarfile's filters, and newer ones reject links without a filter.
    """
    directory.mkdir()
    subprocess.run(["tar", "-x", "-p", "-C", directory], input=archive, check=True)
    return directory

"""Unpack archives that tests have made."""

from __future__ import annotations

import subprocess
from pathlib import Path


def unpacked(archive: bytes, directory: Path) -> Path:
    """Unpack a tar archive as it is into a new directory, and return that.

    By tar(1): tarfile's own filters are not in the Python of Debian 12, and without one newer Pythons refuse links.
    """
    directory.mkdir()
    subprocess.run(["tar", "-x", "-p", "-C", directory], input=archive, check=True)
    return directory

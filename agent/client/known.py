"""Which containers this host has made in a guest, and what each was made of: the agent's API cannot list them.

A file a container, in a directory that goes when the VM goes.  It only says where to look: what is true the agent says.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Known:
    """The containers that were made by commands on this host."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def add(self, container_id: str, **about: Any) -> None:
        """Remember a container, with JSON values about it."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        # A name that no container can have: nobody sees half a file.
        new = self._directory / f".{container_id}.{os.getpid()}"
        new.write_text(json.dumps(about))
        new.rename(self._directory / container_id)

    def discard(self, container_id: str) -> None:
        """Forget a container; fine when it is not known."""
        (self._directory / container_id).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Their ids, in order."""
        if not self._directory.is_dir():
            return []
        return sorted(path.name for path in self._directory.iterdir() if not path.name.startswith("."))

    def about(self, container_id: str) -> dict[str, Any]:
        """What was said about a container when it was made; nothing about one that is not known."""
        try:
            return dict(json.loads((self._directory / container_id).read_text()))
        except FileNotFoundError:
            return {}

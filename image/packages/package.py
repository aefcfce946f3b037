"""Represent a package of any kind that goes into an image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """Represent a fetched package; ``kind`` is deb, apk or wheel."""

    kind: str
    name: str
    version: str
    sha256: str
    file: Path

    @classmethod
    def of(cls, kind: str, name: str, version: str, file: Path) -> Package:
        """Describe the package in a file."""
        return cls(kind, name, version, hashlib.sha256(file.read_bytes()).hexdigest(), file)

    def record(self) -> dict[str, str]:
        """Return what image.json says of it."""
        return {"type": self.kind, "name": self.name, "version": self.version, "sha256": self.sha256}

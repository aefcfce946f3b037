"""image.lock: every package of an image with its version and digest, so that the same image can be built again later.

    {"format": 1, "suite": "trixie", "arch": "amd64", "packages": [{"type", "name", "version", "sha256"}, …]}

Packages are those of ``Package.record()``; one line each, for readable diffs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from caisson.image.errors import ImageError

FORMAT = 1
_FIELDS = ("type", "name", "version", "sha256")


class Drift(ImageError):
    """The packages resolved for an image differ from its lock file; the text names each difference."""

    def __init__(self, differences: list[Difference]) -> None:
        lines = "\n".join(f"  {difference}" for difference in differences)
        super().__init__(f"the packages differ from the lock file:\n{lines}\nto accept them, leave --locked out")
        self.differences = differences


@dataclass(frozen=True)
class Lock:
    """The contents of an image: the suite, Debian's name of the architecture, and all packages."""

    suite: str
    arch: str
    packages: tuple[Mapping[str, str], ...]

    @classmethod
    def of(cls, suite: str, arch: str, records: Iterable[Mapping[str, str]]) -> Lock:
        """Create the lock from packages' records, sorted.  Raises ImageError if a package occurs in two versions."""
        packages = [{field: record[field] for field in _FIELDS} for record in records]
        packages.sort(key=lambda package: (package["type"], package["name"]))
        for first, second in pairwise(packages):
            if _key(first) == _key(second) and first != second:
                raise ImageError(f"{' '.join(_key(first))} is listed twice: {first['version']} and {second['version']}")
        unique = {_key(package): package for package in packages}
        return cls(suite, arch, tuple(unique.values()))


@dataclass(frozen=True)
class Difference:
    """One difference from the lock: what differs, and its value (for a package: its record) on either side, if any."""

    kind: str
    name: str
    locked: str | Mapping[str, str] | None
    resolved: str | Mapping[str, str] | None

    def __str__(self) -> str:
        what = f"{self.kind} {self.name}".strip()
        if isinstance(self.locked, Mapping) and isinstance(self.resolved, Mapping):
            if self.locked["version"] != self.resolved["version"]:
                return f"{what}: {self.locked['version']} is locked, {self.resolved['version']} is there"
            digests = f"sha256 {self.locked['sha256']} is locked, {self.resolved['sha256']} is there"
            return f"{what}: {self.locked['version']} is a different file: {digests}"
        if isinstance(self.locked, Mapping):
            return f"{what}: {self.locked['version']} is locked, but no longer needed or found"
        if isinstance(self.resolved, Mapping):
            return f"{what}: {self.resolved['version']} is not in the lock file"
        return f"{what}: {self.locked} is locked, not {self.resolved}"


def write(lock: Lock, file: Path) -> None:
    """Write a lock file."""
    head = json.dumps({"format": FORMAT, "suite": lock.suite, "arch": lock.arch})
    lines = ",\n".join(f"  {json.dumps(dict(package))}" for package in lock.packages)
    file.write_text(f'{head[:-1]}, "packages": [\n{lines}\n]}}\n', encoding="utf-8")


def read(file: Path) -> Lock:
    """Read a lock file.  Raises ImageError, naming what is invalid in it."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ImageError(f"the lock file {file} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ImageError(f"{file}: is not a lock file of format {FORMAT}; take the image.lock of an image")
    packages = document.get("packages")
    if not isinstance(packages, list):
        raise ImageError(f"{file}: packages must be a list")
    for number, package in enumerate(packages, 1):
        _check(package, f"{file}: package {number}")
    for key in ("suite", "arch"):
        if not isinstance(document.get(key), str):
            raise ImageError(f"{file}: {key} must be a string")
    return Lock.of(document["suite"], document["arch"], packages)


def drift(locked: Lock, resolved: Lock) -> list[Difference]:
    """List the differences of ``resolved`` from ``locked``, sorted; empty if there are none."""
    differences = [
        Difference(name, "", before, now)
        for name, before, now in (("suite", locked.suite, resolved.suite), ("arch", locked.arch, resolved.arch))
        if before != now
    ]
    old = {_key(package): package for package in locked.packages}
    new = {_key(package): package for package in resolved.packages}
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            differences.append(Difference(*key, old.get(key), new.get(key)))
    return differences


def check(locked: Lock, resolved: Lock) -> None:
    """Raise Drift unless ``resolved`` equals the lock."""
    if differences := drift(locked, resolved):
        raise Drift(differences)


def _key(package: Mapping[str, str]) -> tuple[str, str]:
    return package["type"], package["name"]


def _check(package: Any, what: str) -> None:
    if not isinstance(package, dict) or set(package) != set(_FIELDS):
        raise ImageError(f"{what}: must have {', '.join(_FIELDS)} and nothing else")
    for field, value in package.items():
        if not isinstance(value, str) or not value:
            raise ImageError(f"{what}: {field} must be a string, not {value!r}")
    if len(package["sha256"]) != 64 or set(package["sha256"]) - set("0123456789abcdef"):
        raise ImageError(f"{what}: {package['sha256']!r} is not a sha256 in lower-case hex")

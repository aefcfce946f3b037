"""Say where the packages of each distribution come from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from caisson.image.packages import apk, apt
from caisson.image.packages.package import Package

#: Where a distribution's packages are taken from, unless a variable names another place; ports are not for PCs.
UBUNTU, UBUNTU_PORTS = "http://archive.ubuntu.com/ubuntu", "http://ports.ubuntu.com/ubuntu-ports"
ALPINE = "https://dl-cdn.alpinelinux.org/alpine"

#: Of Debian's package ubuntu-archive-keyring.
UBUNTU_KEYRING = "/usr/share/keyrings/ubuntu-archive-keyring.gpg"

#: Where Alpine, and whoever copies its layout, keeps the keys that sign packages.
ALPINE_KEYS = "/etc/apk/keys"

#: An Ubuntu release never changes: fixes are in suites beside it, which Debian has in its point releases.
UBUNTU_POCKETS = ("", "-updates", "-security")


class Packages(Protocol):
    """Provide the packages of one release, from a mirror.  Every method raises ImageError."""

    def update(self) -> None:
        """Fetch the index, and check its signature."""

    def fetch(self, packages: Iterable[str]) -> list[Package]:
        """Fetch exactly these packages, unless they were downloaded before."""

    def fetch_all(self, packages: Iterable[str]) -> list[Package]:
        """Fetch packages and all that they depend on."""

    def fetch_kernel(self, package: str) -> list[Package]:
        """Fetch the packages with the kernel that a package stands for, and with its modules."""


def _debian(directory: Path, suite: str, arch: str) -> Packages:
    mirror = apt.host_mirror()
    security = "" if suite in apt.WITHOUT_SECURITY else apt.security_mirror(mirror)
    return apt.Apt(directory, suite, arch, mirror, security=security)


def _ubuntu(directory: Path, suite: str, arch: str) -> Packages:
    mirror = os.environ.get("CAISSON_UBUNTU_MIRROR") or (UBUNTU if arch == "amd64" else UBUNTU_PORTS)
    keyring = apt.Keyring(
        Path(os.environ.get("CAISSON_UBUNTU_KEYRING") or UBUNTU_KEYRING),
        "it is in Debian's package ubuntu-archive-keyring (from trixie on), and CAISSON_UBUNTU_KEYRING names another",
    )
    return apt.Apt(directory, suite, arch, mirror, keyring, UBUNTU_POCKETS, "CAISSON_UBUNTU_MIRROR")


def _alpine(directory: Path, suite: str, arch: str) -> Packages:
    keys = Path(os.environ.get("CAISSON_ALPINE_KEYS") or ALPINE_KEYS)
    return apk.Apk(directory, suite, arch, os.environ.get("CAISSON_ALPINE_MIRROR") or ALPINE, keys)


_SOURCES: dict[str, Callable[[Path, str, str], Packages]] = {"debian": _debian, "ubuntu": _ubuntu, "alpine": _alpine}


def packages_of(distribution: str, directory: Path, suite: str, architecture: str) -> Packages:
    """Return the packages of a distribution's release, with their files in ``directory``.  Raises ImageError."""
    return _SOURCES[distribution](directory, suite, architecture)


def extract(packages: Iterable[Package], tree: Path) -> None:
    """Unpack packages of any kind over each other; none of their scripts runs."""
    for package in packages:
        (apk if package.kind == "apk" else apt).extract([package], tree)

"""What is different from one distribution to another: where packages come from, and how its C library is laid out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from caisson.image.packages import apk, apt
from caisson.image.packages.package import Package

#: Where a distribution's packages are taken from, unless a variable names another place; ports: not of PCs.
UBUNTU, UBUNTU_PORTS = "http://archive.ubuntu.com/ubuntu", "http://ports.ubuntu.com/ubuntu-ports"
ALPINE = "https://dl-cdn.alpinelinux.org/alpine"

#: Of Debian's package ubuntu-archive-keyring.
UBUNTU_KEYRING = "/usr/share/keyrings/ubuntu-archive-keyring.gpg"

#: Where Alpine itself has the keys that sign its packages, and so has whoever took them from there.
ALPINE_KEYS = "/etc/apk/keys"

#: A release of Ubuntu stays as it was, and what was corrected since is beside it; Debian's point releases have it.
UBUNTU_POCKETS = ("", "-updates", "-security")


class Packages(Protocol):
    """The packages of one release, on a mirror.  Every method raises ImageError."""

    def update(self) -> None:
        """Fetch the index, and check its signature."""

    def fetch(self, packages: Iterable[str]) -> list[Package]:
        """Exactly these packages, downloaded now or before."""

    def fetch_all(self, packages: Iterable[str]) -> list[Package]:
        """The packages and all that they depend on."""

    def fetch_kernel(self, package: str) -> list[Package]:
        """The packages with the kernel that a package stands for, and with its modules."""


@dataclass(frozen=True)
class Distribution:
    """``packages`` makes a source of packages, with its files in a directory, for a release and an architecture.

    ``libraries`` is the directory of the C library in a tree, with {triplet} in it, and ``loader`` the pattern of the
    program loader's name there.  ``wheels`` are pip's platforms, with {machine} in them.  ``kernel_sources``: whether
    it has packages with a kernel's source.
    """

    packages: Callable[[Path, str, str], Packages]
    libraries: str
    loader: str
    wheels: tuple[str, ...]
    kernel_sources: bool


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


_GLIBC = ("manylinux2014_{machine}", *(f"manylinux_2_{minor}_{{machine}}" for minor in (17, 24, 27, 28, 34, 36)))
_MUSL = ("musllinux_1_1_{machine}", "musllinux_1_2_{machine}")

#: What a definition's ``distribution`` may be.
DISTRIBUTIONS = {
    "debian": Distribution(_debian, "usr/lib/{triplet}", "ld-linux-*.so.*", _GLIBC, kernel_sources=True),
    "ubuntu": Distribution(_ubuntu, "usr/lib/{triplet}", "ld-linux-*.so.*", _GLIBC, kernel_sources=True),
    "alpine": Distribution(_alpine, "usr/lib", "ld-musl-*.so.1", _MUSL, kernel_sources=False),
}


def extract(packages: Iterable[Package], tree: Path) -> None:
    """Unpack packages of any kind over each other; none of their scripts runs."""
    for package in packages:
        (apk if package.kind == "apk" else apt).extract([package], tree)

"""The programs that making and booting images needs: where they are, and which Debian packages bring them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable

from caisson.image.errors import ImageError

#: What it takes to build an image, and more with a kernel from source; to boot one; to make a container's disk.
TO_BUILD = ("gcc", "make", "musl-gcc", "strip", "zstd", "mkfs.erofs", "mksquashfs")
TO_COMPILE = ("flex", "bison", "bc", "xz")
TO_BOOT = ("qemu-system-x86_64", "setpriv")
TO_PACK = ("sqfstar", "zstd")

#: Which Debian packages bring a program, where the names differ.
PACKAGES = {
    "/usr/bin/python3": "python3",
    "apt-config": "apt",
    "apt-get": "apt",
    "busybox": "busybox-static",
    "clang": "clang libclang-rt-dev",
    "dpkg-deb": "dpkg",
    "flex": "flex libelf-dev",
    "gcc": "gcc libc6-dev",
    "gpg": "gnupg",
    "ip": "iproute2",
    "mke2fs": "e2fsprogs",
    "mkfs.erofs": "erofs-utils",
    "mksquashfs": "squashfs-tools",
    "musl-gcc": "musl-tools",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-x86_64": "qemu-system-x86",
    "readelf": "binutils",
    "setpriv": "util-linux",
    "sfdisk": "fdisk",
    "sqfstar": "squashfs-tools",
    "strip": "binutils",
    "veritysetup": "cryptsetup-bin",
    "xz": "xz-utils",
}

#: Where Debian has programs that an ordinary user can run, but does not find in PATH; virtiofsd is in the last two.
SYSTEM = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/libexec", "/usr/lib/qemu")


def search_path() -> str:
    """PATH, and after it the system's own places."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), *SYSTEM))


def which(program: str) -> str | None:
    """Where a program is, if it is installed."""
    return shutil.which(program, path=search_path())


def package_of(program: str) -> str:
    """The packages that bring a program, separated by spaces."""
    return PACKAGES.get(program, program)


def need(programs: Iterable[str], report: Callable[[str], None]) -> None:
    """Have these programs: for root, apt installs what is missing.  Raises ImageError with the command that would."""
    missing = (package_of(program).split() for program in programs if which(program) is None)
    packages = sorted({package for names in missing for package in names})
    if not packages:
        return
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    if os.geteuid() != 0 or which("apt-get") is None:
        raise ImageError(f"this machine lacks {', '.join(packages)}; run: sudo {' '.join(install)}")
    report(f"installing {', '.join(packages)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for step in (["apt-get", "update"], install):
        done = subprocess.run(step, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            raise ImageError(f"`{' '.join(step)}` failed:\n{done.stderr.strip() or done.stdout.strip()}")

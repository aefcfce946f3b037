"""The programs that making and booting images needs: where they are, and which Debian packages bring them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from caisson.image.errors import ImageError

#: What it takes to build an image, and more with a kernel from source; to boot one; to make a container's disk.
TO_BUILD = ("gcc", "make", "musl-gcc", "strip", "zstd", "mkfs.erofs", "mksquashfs")
TO_COMPILE = ("flex", "bison", "bc", "xz")
#: What kernels of a suite are unpacked with, where that is none of the above.
TO_UNPACK_KERNEL = {"bookworm": ("lz4",)}
#: By what uname says of a machine.
QEMU = {"x86_64": "qemu-system-x86_64", "aarch64": "qemu-system-aarch64"}
TO_BOOT = (QEMU.get(platform.machine(), QEMU["x86_64"]),)
TO_PACK = ("sqfstar", "zstd")


def to_cross_build(triplet: str) -> tuple[str, ...]:
    """Return what it takes besides TO_BUILD to build an image of another architecture, by GNU's name of it."""
    return (f"{triplet}-gcc", f"{triplet}-strip")


#: What serves pods: namespaces, network, mounts, shares.
TO_SERVE_PODS = ("ip", "tc", "nsenter", "unshare", "mount", "virtiofsd")

#: What Debian's packages are verified with: a file where others are programs.
DEBIAN_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

Report = Callable[[str], None]

#: What apt and dpkg say when another holds a lock; how long it is waited for, in seconds, and how often tried again.
LOCKED = re.compile(r"Could not get lock|Unable to acquire the dpkg frontend lock|Unable to lock directory")
LOCK_TIMEOUT = 1800.0
LOCK_INTERVAL = 2.0

#: Which Debian packages bring a program, where the names differ.
PACKAGES = {
    "/usr/bin/python3": "python3",
    DEBIAN_KEYRING: "debian-archive-keyring",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "/usr/aarch64-linux-gnu/lib/libc.a": "libc6-dev-arm64-cross",
    "aarch64-linux-gnu-strip": "binutils-aarch64-linux-gnu",
    "apt-config": "apt",
    "apt-ftparchive": "apt-utils",
    "apt-get": "apt",
    "busybox": "busybox-static",
    "clang": "clang libclang-rt-dev",
    "dpkg-deb": "dpkg",
    "flex": "flex libelf-dev",
    "gcc": "gcc libc6-dev",
    "go": "golang-go",
    "gpg": "gnupg",
    "ip": "iproute2",
    "mke2fs": "e2fsprogs",
    "mkfs.erofs": "erofs-utils",
    "mksquashfs": "squashfs-tools",
    "nsenter": "util-linux",
    "musl-gcc": "musl-tools",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-x86_64": "qemu-system-x86",
    "readelf": "binutils",
    "sfdisk": "fdisk",
    "sqfstar": "squashfs-tools",
    "strip": "binutils",
    "tc": "iproute2",
    "unshare": "util-linux",
    "veritysetup": "cryptsetup-bin",
    "x86_64-linux-gnu-gcc": "gcc-x86-64-linux-gnu",
    "x86_64-linux-gnu-strip": "binutils-x86-64-linux-gnu",
    "xz": "xz-utils",
}

#: Where programs are that an ordinary user can run, but does not find in PATH: Debian's (virtiofsd is in the last two
#: of these), and Go as its own archive installs it.
SYSTEM = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/libexec", "/usr/lib/qemu", "/usr/local/go/bin")


def search_path() -> str:
    """Return PATH, and after it the system's own places."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), *SYSTEM))


def which(program: str) -> str | None:
    """Find a program, if it is installed."""
    return shutil.which(program, path=search_path())


def package_of(program: str) -> str:
    """Return the packages that bring a program, separated by spaces."""
    return PACKAGES.get(program, program)


class MissingPrograms(ImageError):
    """Programs are missing and could not be installed; the text has the command that installs them."""


def packages_of_missing(programs: Iterable[str]) -> list[str]:
    """Return the Debian packages that bring those programs that are not there."""
    missing = (package_of(program).split() for program in programs if not _is_there(program))
    return sorted({package for names in missing for package in names})


def _is_there(program: str) -> bool:
    return Path(program).exists() if program.startswith("/") else which(program) is not None


def install_command(packages: Iterable[str]) -> str:
    """Return the command that installs packages; a keyring's file can be gone although its package is there."""
    packages = list(packages)
    again = "--reinstall " if any(package.endswith("-keyring") for package in packages) else ""
    return f"sudo apt-get install --yes --no-install-recommends {again}{' '.join(packages)}"


def need(programs: Iterable[str], report: Report) -> None:
    """Have these programs: for root, apt installs what is missing.  Raises MissingPrograms."""
    need_packages(packages_of_missing(programs), report)


def need_packages(packages: Sequence[str], report: Report) -> None:
    """Install these packages, for root and with apt.  Raises MissingPrograms, which names them all."""
    if not packages:
        return
    if os.geteuid() != 0 or which("apt-get") is None:
        raise MissingPrograms(f"missing: {', '.join(packages)}; install with: {install_command(packages)}")
    install = install_command(packages).split()[1:]
    report(f"installing {', '.join(packages)}")
    for step in (["apt-get", "update"], install):
        _apt(step, report)


def _apt(step: Sequence[str], report: Report) -> None:
    """Run apt-get, as soon as no other apt or dpkg holds a lock.  Raises MissingPrograms."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    deadline = time.monotonic() + LOCK_TIMEOUT
    waiting = False
    while True:
        done = subprocess.run(step, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode == 0:
            return
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        holder = next((line for line in lines if LOCKED.search(line)), None)
        if holder is None or time.monotonic() > deadline:
            reason = "; ".join(line.removeprefix("E: ") for line in lines if line.startswith("E:")) or lines[-1:]
            raise MissingPrograms(f"`{' '.join(step)}`: failed ({reason}); run it by hand to see all of its output")
        if not waiting:
            report(f"another program holds apt's lock ({holder.removeprefix('E: ')}); waiting for it")
            waiting = True
        time.sleep(LOCK_INTERVAL)

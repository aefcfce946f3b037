"""The programs needed to build and boot images: their locations, and their Debian packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from caisson.image.errors import ImageError

#: Programs to build an image, to compile a kernel, to boot a guest, to create a container's disk.
TO_BUILD = ("gcc", "make", "musl-gcc", "strip", "zstd", "mkfs.erofs", "mksquashfs")
TO_COMPILE = ("flex", "bison", "bc", "xz")
#: Further programs to unpack a suite's kernels.
TO_UNPACK_KERNEL = {"bookworm": ("lz4",)}
#: By uname's machine name.
QEMU = {"x86_64": "qemu-system-x86_64", "aarch64": "qemu-system-aarch64"}
TO_BOOT = (QEMU.get(os.uname().machine, QEMU["x86_64"]),)
TO_PACK = ("sqfstar", "zstd")


def to_cross_build(triplet: str) -> tuple[str, ...]:
    """Return the programs besides TO_BUILD to build an image for another architecture, by its GNU name."""
    return (f"{triplet}-gcc", f"{triplet}-strip")


#: Programs to serve pods: namespaces, network, mounts, shares.
TO_SERVE_PODS = ("ip", "tc", "nsenter", "unshare", "mount", "virtiofsd")

#: The keyring to verify Debian's packages: a file, unlike the programs.
DEBIAN_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

Report = Callable[[str], None]

#: Messages of apt and dpkg when another process holds a lock; seconds to wait for it, and between attempts.
LOCKED = re.compile(r"Could not get lock|Unable to acquire the dpkg frontend lock|Unable to lock directory")
LOCK_TIMEOUT = 1800.0
LOCK_INTERVAL = 2.0

#: Debian packages of programs, if the names differ.
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
    """Return PATH, followed by the system's own directories."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), *SYSTEM))


def which(program: str) -> str | None:
    """Find a program, if it is installed."""
    return shutil.which(program, path=search_path())


def package_of(program: str) -> str:
    """Return the packages that contain a program, separated by spaces."""
    return PACKAGES.get(program, program)


class MissingPrograms(ImageError):
    """Programs are missing and could not be installed; the text has the command that installs them."""


def packages_of_missing(programs: Iterable[str]) -> list[str]:
    """Return the Debian packages of missing programs."""
    missing = (package_of(program).split() for program in programs if not _is_there(program))
    return sorted({package for names in missing for package in names})


def _is_there(program: str) -> bool:
    return Path(program).exists() if program.startswith("/") else which(program) is not None


def install_command(packages: Iterable[str]) -> str:
    """Return the command that installs packages; a keyring's file can be missing although its package is installed."""
    packages = list(packages)
    again = "--reinstall " if any(package.endswith("-keyring") for package in packages) else ""
    return f"sudo apt-get install --yes --no-install-recommends {again}{' '.join(packages)}"


def require(programs: Iterable[str], report: Report) -> None:
    """Ensure that these programs exist: as root, install missing ones with apt.  Raises MissingPrograms."""
    require_packages(packages_of_missing(programs), report)


def require_packages(packages: Sequence[str], report: Report) -> None:
    """Install these packages with apt, as root.  Raises MissingPrograms, which names them all."""
    if not packages:
        return
    if os.geteuid() != 0 or which("apt-get") is None:
        raise MissingPrograms(f"missing: {', '.join(packages)}; install with: {install_command(packages)}")
    install = install_command(packages).split()[1:]
    report(f"installing {', '.join(packages)}")
    for step in (["apt-get", "update"], install):
        _apt(step, report)


def _apt(step: Sequence[str], report: Report) -> None:
    """Run apt-get, once no other apt or dpkg holds a lock.  Raises MissingPrograms."""
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

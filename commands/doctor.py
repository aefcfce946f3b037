"""Check what this machine supports and what is missing, and name the command that fixes it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from caisson.image.build.cache import default_root
from caisson.image.programs import (
    DEBIAN_KEYRING,
    TO_BOOT,
    TO_BUILD,
    TO_COMPILE,
    TO_PACK,
    install_command,
    packages_of_missing,
    which,
)
from caisson.image.vm.accel import Choice, Host, choose_accelerator, choose_vsock
from caisson.image.vm.errors import VMError
from caisson.image.vm.hotplug.virtiofs import command as share_command
from caisson.image.vm.runroot import run_root
from caisson.proto.contract import VERSION

#: "ok"; "limited": it works, with limitations; "missing": no guest can be built or booted.
Status = Literal["ok", "limited", "missing"]

#: Bytes of free disk: the least for a first image with its downloads, and a comfortable amount.
LEAST_DISK, GOOD_DISK = 10**9, 4 * 10**9

#: Bytes of memory that should be available for a guest.
GOOD_MEMORY = 10**9


@dataclass(frozen=True)
class Finding:
    """The result of one check; ``remedy`` is a command or an instruction, "" if there is no problem."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Check everything, in the order in which it is needed."""
    host = Host.current()
    checks: tuple[Callable[[], Finding], ...] = (
        _python,
        lambda: _programs("build tools", TO_BUILD, "images cannot be built"),
        _keyring,
        _mirror_tools,
        lambda: _qemu(host),
        lambda: _kvm(host),
        lambda: _vsock(host),
        lambda: _programs("kernel tools", TO_COMPILE, "no kernel from source (template lean, snapshots)", "limited"),
        lambda: _programs("container tools", TO_PACK, "`caisson run` cannot pack container images", "limited"),
        _virtiofsd,
        _disk,
        _run_directory,
        _memory,
    )  # fmt: skip
    return [check() for check in checks]


def _python() -> Finding:
    return Finding("caisson", "ok", f"{VERSION}, Python {platform.python_version()} ({sys.executable})")


def _programs(name: str, programs: Sequence[str], consequence: str, without: Status = "missing") -> Finding:
    lacking = [program for program in programs if which(program) is None]
    if not lacking:
        return Finding(name, "ok", ", ".join(programs))
    packages = packages_of_missing(lacking)
    return Finding(name, without, f"{', '.join(lacking)} not installed: {consequence}", install_command(packages))


def _keyring() -> Finding:
    packages = packages_of_missing([DEBIAN_KEYRING])
    if not packages:
        return Finding("keyring", "ok", DEBIAN_KEYRING)
    found = f"{DEBIAN_KEYRING} is missing: Debian's packages cannot be verified"
    return Finding("keyring", "missing", found, install_command(packages))


def _mirror_tools() -> Finding:
    return _programs("apt", ("apt-get", "apt-config", "dpkg-deb"), "Debian's packages cannot be fetched")


def _qemu(host: Host) -> Finding:
    program = next((name for name in TO_BOOT if name.startswith("qemu")), f"qemu-system-{host.machine}")
    path = which(program)
    if path is None:
        return _programs("QEMU", TO_BOOT, "no guest can be booted")
    done = subprocess.run([path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        return Finding("QEMU", "missing", f"{path} does not run: {done.stderr.strip()[:200]}", f"{path} --version")
    return Finding("QEMU", "ok", f"{done.stdout.partition(chr(10))[0]} ({path})")


def _kvm(host: Host) -> Finding:
    return _device("KVM", "guests are emulated, and slower", lambda: choose_accelerator("kvm", host.machine, host))


def _vsock(host: Host) -> Finding:
    return _device("vhost-vsock", "our own vsock device is used", lambda: choose_vsock("vhost", host))


def _device(name: str, instead: str, choose: Callable[[], Choice]) -> Finding:
    """Request a device as a user who insists on it would."""
    try:
        choice = choose()
    except VMError as error:
        problem, _, remedy = str(error).partition(": ")[2].partition("; ")
        return Finding(name, "limited", f"{problem}: {instead}", remedy.partition(", or choose")[0])
    if choice.doubt:
        remedy = "use a machine with hardware virtualization; in a VM, turn on nested virtualization on its host"
        return Finding(name, "limited", f"{choice.doubt}: {instead}", remedy)
    return Finding(name, "ok", choice.reason.partition(": ")[2] or choice.reason)


def _virtiofsd() -> Finding:
    path = which("virtiofsd")
    if path:
        try:
            share_command(Path("/"), 0, writable=True)
        except VMError as error:
            problem, _, remedy = str(error).removeprefix(f"{path}: ").partition("; ")
            return Finding("virtiofsd", "limited", f"{path} {problem}", remedy)
        return Finding("virtiofsd", "ok", path)
    found = "not installed: `caisson share` works only for directories that were shared at boot"
    return Finding("virtiofsd", "limited", found, install_command(["virtiofsd"]))


def _disk() -> Finding:
    root = default_root()
    place = _existing(root)
    free = shutil.disk_usage(place).free
    found = f"{free / 1e9:.1f} GB free for {root}"
    if not os.access(place, os.W_OK):
        return Finding("cache", "missing", f"{place} is not writable", "choose another: export CAISSON_CACHE=DIR")
    if free < LEAST_DISK:
        return Finding("cache", "missing", f"{found}: too little for an image", "caisson clean --all")
    if free < GOOD_DISK:
        return Finding("cache", "limited", f"{found}: too little for kernels from source", "caisson clean")
    return Finding("cache", "ok", found)


def _run_directory() -> Finding:
    root = run_root()
    place = _existing(root)
    if os.access(place, os.W_OK):
        return Finding("run directory", "ok", str(root))
    return Finding("run directory", "missing", f"{place} is not writable", "choose another: export CAISSON_RUN=DIR")


def _existing(path: Path) -> Path:
    """Return the path, or its nearest parent directory that exists."""
    return next(place for place in (path, *path.parents) if place.is_dir())


def _memory() -> Finding:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    found = f"{free / 1e9:.1f} GB available"
    if free < GOOD_MEMORY:
        return Finding("memory", "limited", found, "stop other programs, or boot with less: --memory 256M")
    return Finding("memory", "ok", found)


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Format the findings as text, each remedy below its problem."""
    marks = {"ok": "ok", "limited": "--", "missing": "NO"}
    for finding in findings:
        yield f"{marks[finding.status]:2}  {finding.name:<16} {finding.found}"
        if finding.remedy:
            yield f"    {'':<16} → {finding.remedy}"
    missing = [finding.name for finding in findings if finding.status == "missing"]
    limited = [finding.name for finding in findings if finding.status == "limited"]
    yield ""
    if missing:
        yield f"Guests cannot be built and booted here yet: {', '.join(missing)}."
    elif limited:
        yield f"Guests can be built and booted here; limited: {', '.join(limited)}."
    else:
        yield "Guests can be built and booted here."


def documents(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """Return the findings for programs: name, status, found, remedy."""
    return [asdict(finding) for finding in findings]

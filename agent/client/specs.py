"""The OCI runtime specification (config.json) of a container: from defaults, an image, or a bundle.

Namespaces, mounts, masks and capabilities are those that container engines agree on: a private view of processes,
mounts, IPC and host name; no way to load modules, set the clock or reach the guest's devices.  The network namespace is
the guest's, as in every Kata guest: there is one pod in a VM.

Specs are decoded config.json documents; words that are no UTF-8 are in them as os.fsdecode() has them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from caisson.agent.client import bundles, seccomp
from caisson.agent.client.errors import UsageError

if TYPE_CHECKING:
    from caisson.proto.kata1 import oci_pb2

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: Docker's default set (moby profiles), less CAP_MKNOD: /dev is made by the runtime.
CAPABILITIES = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
]

MOUNTS = [
    ("/proc", "proc", "proc", "nosuid,noexec,nodev"),
    ("/dev", "tmpfs", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
    ("/dev/pts", "devpts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
    ("/dev/shm", "tmpfs", "shm", "nosuid,noexec,nodev,mode=1777,size=65536k"),
    ("/dev/mqueue", "mqueue", "mqueue", "nosuid,noexec,nodev"),
    ("/sys", "sysfs", "sysfs", "nosuid,noexec,nodev,ro"),
]

MASKED = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
]

#: Masked for each CPU of the guest.
THERMAL = "/sys/devices/system/cpu/cpu{}/thermal_throttle"

READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]

#: Processes and threads of a container, and the share of the guest's memory that it may use, unless told otherwise.
PIDS_LIMIT = 2048
MEMORY_SHARE = 0.75
MIB = 1 << 20

#: A container of less memory cannot start a program.
MIN_MEMORY = 6 * MIB

#: A container's quota is for so many microseconds (cgroup v2, cpu.max).
CPU_PERIOD = 100_000

#: Where --init has its program: in /dev, which is the container's own.  busybox is what it is called.
INIT = "/dev/.caisson/busybox"

#: A first process that passes signals on, reaps what is left to it, and ends as its child does.
INIT_SCRIPT = """exec 3<&0; "$@" <&3 3<&- & child=$!; exec 3<&-
for name in HUP INT QUIT TERM USR1 USR2; do trap "kill -$name $child" $name; done
while :; do wait $child; status=$?; kill -0 $child 2>/dev/null || exit $status; done"""

Document = dict[str, Any]


@dataclass(frozen=True)
class SharedVolume:
    """A share of the host's in a container: a file system of the guest by its ``fstype`` and ``tag``."""

    fstype: str
    tag: str
    destination: str
    writable: bool = True


@dataclass(frozen=True)
class RunOptions:
    """What `run` was asked for beside the image; empty or None is "as the image and the defaults have it".

    ``memory`` is in bytes, ``cpus`` in CPUs, ``pids_limit`` -1 for none.  ``tmpfs`` holds PATH[:OPTIONS].
    ``guest_memory`` is the VM's, in bytes, ``guest_cpus`` how many it may come to have, and ``busybox`` where the guest
    has the program of --init.
    """

    env: Sequence[str] = ()
    user: str = ""
    workdir: str = ""
    terminal: bool = False
    hostname: str = ""
    entrypoint: str | None = None
    memory: int = 0
    cpus: float = 0.0
    pids_limit: int | None = None
    read_only: bool = False
    tmpfs: Sequence[str] = ()
    volumes: Sequence[SharedVolume] = ()
    cap_add: Sequence[str] = ()
    cap_drop: Sequence[str] = ()
    privileged: bool = False
    init: bool = False
    architecture: str = "amd64"
    guest_memory: int = 0
    guest_cpus: int = 1
    busybox: str = ""


def keep_alive() -> list[str]:
    """Return a first process that reaps orphans and exits on SIGTERM."""
    return ["/bin/sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 2147483647 & wait $!; done"]


def container_document(
    rootfs: str,
    args: Sequence[str] = (),
    *,
    env: Sequence[str] = (),
    cwd: str = "/",
    hostname: str = "caisson",
    terminal: bool = False,
    scratch: Sequence[str] = ("/tmp", "/run", "/root", "/home", "/var"),
) -> Document:
    """Return the spec of a container whose root is a directory of the guest, read-only but for tmpfs on ``scratch``.

    ``args`` defaults to ``keep_alive``.
    """
    mounts = [_mount(where, kind, source, options) for where, kind, source, options in MOUNTS]
    mounts += [_mount(where, "tmpfs", "tmpfs", _scratch_options(where)) for where in scratch]
    process = {
        "args": list(args) or keep_alive(),
        "env": [PATH, "HOME=/root", *env],
        "cwd": cwd,
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "noNewPrivileges": True,
        "capabilities": {kind: list(CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
    }
    return {
        "ociVersion": "1.2.0",
        "hostname": hostname,
        "root": {"path": rootfs, "readonly": True},
        "mounts": mounts,
        "process": process,
        # No pid namespace in the list: the agent decides it, and gives each container its own.
        "linux": {
            "namespaces": [{"type": kind} for kind in ("mount", "ipc", "uts", "cgroup")],
            "maskedPaths": [*MASKED, THERMAL.format(0)],
            "readonlyPaths": list(READONLY),
        },
    }


def guest_document(
    args: Sequence[str], busybox: str, *, env: Sequence[str] = (), cwd: str = "/", user: tuple[int, int] = (0, 0)
) -> Document:
    """Return the spec of a program that is confined by the guest alone, in its root, which the caller sets.

    /proc shows all the guest's processes.  In PATH the programs of the guest's packages come before those of busybox.
    """
    uid, gid = user
    return {
        "ociVersion": "1.2.0",
        "root": {"path": "", "readonly": False},
        "mounts": [_mount("/dev", "bind", "/dev", "rbind")],  # so that nothing is made in it
        "process": {
            "args": list(args),
            "env": [f"{PATH}:{busybox}/bin", "HOME=/", *env],
            "cwd": cwd,
            "user": {"uid": uid, "gid": gid},
            "capabilities": {kind: list(bundles.ALL_CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
        },
        "linux": {"namespaces": [{"type": kind} for kind in ("mount", "ipc", "uts")]},
    }


def _mount(destination: str, kind: str, source: str, options: str) -> Document:
    return {"destination": destination, "type": kind, "source": source, "options": options.split(",")}


def _scratch_options(where: str) -> str:
    """All of a default container together are below MEMORY_SHARE: who fills them gets ENOSPC, and is not killed."""
    return "nosuid,nodev," + ("mode=1777,size=45%" if where == "/tmp" else "mode=755,size=7%")


def default_spec(rootfs: str, args: Sequence[str] = (), **options: Any) -> oci_pb2.Spec:
    """Return `container_document` as Kata 1.x has it on the wire; it has no field for a filter's errno."""
    from caisson.agent.client.wire_specs import to_wire  # here: commands send JSON

    return to_wire(container_document(rootfs, args, **options))


def confined(document: Document, guest_memory: int, architecture: str = "amd64", cpus: int = 1) -> Document:
    """Fill in what a spec leaves out: Docker's system call filter, masks, and limits on processes and memory.

    ``guest_memory`` is in bytes; 0 is for a guest that nothing is known of, which may not know of limits either.
    ``cpus`` are those that the guest has or may come to have.
    """
    linux = document.setdefault("linux", {})
    masked = linux.get("maskedPaths") or []
    linux["maskedPaths"] = list(dict.fromkeys([*masked, *(THERMAL.format(number) for number in range(cpus))]))
    if not linux.get("seccomp"):
        capabilities = document["process"].get("capabilities") or {}
        linux["seccomp"] = seccomp.default_profile(capabilities.get("bounding") or (), architecture)
    if guest_memory:
        resources = linux["resources"] = linux.get("resources") or {}
        resources["pids"] = resources.get("pids") or {"limit": PIDS_LIMIT}
        memory = resources.get("memory") or {}
        resources["memory"] = memory if memory.get("limit") else {**memory, "limit": int(guest_memory * MEMORY_SHARE)}
    return document


class ImageConfig(Protocol):
    """The configuration of a container image; image.containers.documents has it."""

    @property
    def entrypoint(self) -> Sequence[str]: ...

    @property
    def command(self) -> Sequence[str]: ...

    @property
    def env(self) -> Sequence[str]: ...

    @property
    def user(self) -> str: ...

    @property
    def workdir(self) -> str: ...


def image_document(
    config: ImageConfig,
    bundle: Mapping[str, Any],
    words: Sequence[str],
    options: RunOptions,
    warn: Any = lambda line: None,
) -> Document:
    """Return the spec of an image, or of a bundle if its config.json is not empty; options override both.

    Its root is set when it is created.  ``warn`` gets a line about each field of a bundle that means nothing in a
    guest.  Raises UsageError.
    """
    if bundle:
        document = bundles.adapted(bundle, MASKED, READONLY, MOUNTS, options.privileged, warn)
        if words:
            document["process"]["args"] = list(words)
    else:
        document = container_document("", _words(config, words, options), scratch=())
        document["process"] |= {"noNewPrivileges": False, "cwd": config.workdir, "env": [PATH, *config.env]}
        document["process"]["user"] = {"username": config.user or "0"}
        document["root"]["readonly"] = False
        document["hostname"] = "caisson"
    if not options.privileged:
        _fit_memory(document["linux"], options.guest_memory, warn)
    _apply(document, options)
    if options.privileged:
        return document
    return confined(document, options.guest_memory, options.architecture, options.guest_cpus)


def _fit_memory(linux: Document, guest_memory: int, warn: Any) -> None:
    """Lower a bundle's limit, made for a larger machine, to what leaves the guest its own."""
    memory = (linux.get("resources") or {}).get("memory") or {}
    most, limit = int(guest_memory * MEMORY_SHARE), memory.get("limit") or 0
    if 0 < most < limit:
        warn(f"config.json: linux.resources.memory.limit: {limit} is lowered to {most}: the guest has {guest_memory}")
        memory["limit"] = most
        if (memory.get("swap") or 0) > 0:
            memory["swap"] = most


def _words(config: ImageConfig, words: Sequence[str], options: RunOptions) -> list[str]:
    if options.entrypoint is not None:  # it replaces the image's words, all of them, as with docker
        found = [*([options.entrypoint] if options.entrypoint else []), *words]
        if not found:
            raise UsageError("--entrypoint '': no program is left; name one after --")
        return found
    return [*config.entrypoint, *(words or config.command)]


def _apply(document: Document, options: RunOptions) -> None:
    process, linux = document["process"], document["linux"]
    process["terminal"] = bool(process.get("terminal")) or options.terminal
    settings = [*terminal_env(process["terminal"]), *(process.get("env") or ()), *options.env]
    process["env"] = [f"{name}={value}" for name, value in dict(one.partition("=")[::2] for one in settings).items()]
    process["cwd"] = options.workdir or process.get("cwd") or "/"
    if options.user:
        process["user"] = {"username": options.user}
    document["hostname"] = options.hostname or document.get("hostname") or "caisson"
    document["root"]["readonly"] = bool(document["root"].get("readonly")) or options.read_only
    for one in options.tmpfs:
        where, _, wanted = one.partition(":")
        if not where.startswith("/"):
            raise UsageError(f"--tmpfs {one}: must be PATH[:OPTIONS], with an absolute path")
        document["mounts"].append(_mount(where, "tmpfs", "tmpfs", wanted or "nosuid,nodev,noexec,mode=1777,size=64m"))
    _limit(linux, options)
    _set_capabilities(process, linux, options)
    if options.init:
        document["mounts"].append(_mount(INIT, "bind", options.busybox, "bind,ro"))
        process["args"] = [INIT, "sh", "-c", INIT_SCRIPT, "init", *process["args"]]


def _limit(linux: Document, options: RunOptions) -> None:
    resources = linux.get("resources") or {}
    if options.memory:
        if options.memory < MIN_MEMORY:
            raise UsageError(f"--memory {options.memory}: too little for a container; give {MIN_MEMORY // MIB}m")
        resources["memory"] = {"limit": options.memory, "swap": options.memory}
    if options.cpus:
        resources["cpu"] = {"quota": int(options.cpus * CPU_PERIOD), "period": CPU_PERIOD}
    if options.pids_limit is not None:
        resources["pids"] = {"limit": options.pids_limit if options.pids_limit > 0 else -1}
    if resources:
        linux["resources"] = resources


def _set_capabilities(process: Document, linux: Document, options: RunOptions) -> None:
    sets = process.get("capabilities") or {}
    held = set(sets.get("bounding") or ())
    if options.privileged:
        held = set(bundles.ALL_CAPABILITIES)
        linux["maskedPaths"], linux["readonlyPaths"] = [], []
        linux.pop("seccomp", None)
    added, dropped = _capabilities(options.cap_add), _capabilities(options.cap_drop)
    if "ALL" in _upper(options.cap_drop):
        dropped -= added  # all but these
    held = (held | added) - dropped
    if options.privileged or options.cap_add or options.cap_drop:
        process["capabilities"] = {kind: sorted(held) for kind in ("bounding", "effective", "permitted")}


def _upper(names: Iterable[str]) -> list[str]:
    return [name.upper().removeprefix("CAP_") for name in names]


def _capabilities(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for name in _upper(names):
        if name == "ALL":
            found |= set(bundles.ALL_CAPABILITIES)
        elif f"CAP_{name}" in bundles.ALL_CAPABILITIES:
            found.add(f"CAP_{name}")
        else:
            raise UsageError(f"capability {name!r}: unknown; capabilities(7) names them, e.g. NET_ADMIN")
    return found


def terminal_env(terminal: bool) -> list[str]:
    """Return TERM for a program on a terminal, the caller's own."""
    return [f"TERM={os.environ.get('TERM', 'xterm')}"] if terminal else []


def user_ids(text: str) -> tuple[int, int]:
    """Parse uid[:gid]; the group defaults to 0.  Raises UsageError."""
    uid, _, gid = text.partition(":")
    for number in (uid, gid or "0"):
        if not number.isascii() or not number.isdecimal():
            raise UsageError(f"--user {text!r}: is not a number; give UID or UID:GID")
        if int(number) >= (1 << 32) - 1:
            raise UsageError(f"--user {text!r}: {number} is out of range; ids are 0 to {(1 << 32) - 2}")
    return int(uid), int(gid or 0)


def env_file(path: str) -> list[str]:
    """Read settings from a file: NAME=value in each line, NAME for the caller's own value, "#" before a comment.

    Raises UsageError.
    """
    try:
        lines = Path(path).read_bytes().decode("utf-8", "surrogateescape").splitlines()
    except OSError as error:
        raise UsageError(f"--env-file {path}: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, 1):
        name, equals, value = line.lstrip().partition("=")
        if not name or name.startswith("#"):
            continue
        if re.search(r"\s", name):
            raise UsageError(
                f"--env-file {path}: line {number}: {name!r} is not the name of a variable; write NAME=value"
            )
        if equals or name in os.environ:
            found.append(f"{name}={value if equals else os.environ[name]}")
    return found


def size(text: str, option: str = "--memory") -> int:
    """Parse a number of bytes: 64m, 1.5g, 512MiB, 1000000; units are powers of 1024.  Raises UsageError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not found:
        raise UsageError(f"{option} {text!r}: must be a number of bytes, e.g. 64m or 1g")
    return int(float(found[1]) * 1024 ** "kmgt".index(found[2], 0) * 1024) if found[2] else int(float(found[1]))

"""The OCI configuration (config.json) of `run`: an image or a bundle, with docker's options applied.

Source of the options' meaning: docker-run(1).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from caisson.agent.base.syscalls import CAPABILITIES
from caisson.agent.client import bundles
from caisson.agent.client.caller import PATH, terminal_env
from caisson.agent.client.errors import UsageError
from caisson.agent.client.specs import (
    MASKED,
    MEMORY_SHARE,
    MOUNTS,
    READONLY,
    Document,
    confine,
    container_document,
    mount_entry,
)

MIB = 1 << 20

#: A container with less memory cannot start a program.
MIN_MEMORY = 6 * MIB

#: Period of a container's CPU quota in microseconds (cgroup v2, cpu.max).
CPU_PERIOD = 100_000

#: Path of --init's program: in /dev, which is the container's own.  It must be called busybox.
INIT = "/dev/.caisson/busybox"

#: An init that forwards signals, reaps orphans, and exits with its child's status.
INIT_SCRIPT = """exec 3<&0; "$@" <&3 3<&- & child=$!; exec 3<&-
for name in HUP INT QUIT TERM USR1 USR2; do trap "kill -$name $child" $name; done
while :; do wait $child; status=$?; kill -0 $child 2>/dev/null || exit $status; done"""


@dataclass(frozen=True)
class SharedVolume:
    """A host share in a container: a file system in the guest, by its ``fstype`` and ``tag``."""

    fstype: str
    tag: str
    destination: str
    writable: bool = True


@dataclass(frozen=True)
class RunOptions:
    """Options of `run` besides the image; empty or None means the image's or the default value.

    ``memory`` is in bytes, ``cpus`` in CPUs, ``pids_limit`` -1 for none.  ``tmpfs`` holds PATH[:OPTIONS].
    ``guest_memory`` is the VM's, in bytes, ``guest_cpus`` its maximum, and ``busybox`` the path of --init's program in
    the guest.
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


class ImageConfig(Protocol):
    """The configuration of a container image; image.containers.documents implements it."""

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

    Its root is set when it is created.  ``warn`` gets a line about each field of a bundle that has no meaning in a
    guest.  Raises UsageError.
    """
    if bundle:
        document = bundles.adapt(bundle, MASKED, READONLY, MOUNTS, options.privileged, warn)
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
    return confine(document, options.guest_memory, options.architecture, options.guest_cpus)


def _fit_memory(linux: Document, guest_memory: int, warn: Any) -> None:
    """Lower a bundle's limit, made for a larger machine, so that the guest keeps memory of its own."""
    memory = (linux.get("resources") or {}).get("memory") or {}
    most, limit = int(guest_memory * MEMORY_SHARE), memory.get("limit") or 0
    if 0 < most < limit:
        warn(f"config.json: linux.resources.memory.limit: {limit} is lowered to {most}: the guest has {guest_memory}")
        memory["limit"] = most
        if (memory.get("swap") or 0) > 0:
            memory["swap"] = most


def _words(config: ImageConfig, words: Sequence[str], options: RunOptions) -> list[str]:
    if options.entrypoint is not None:  # it replaces the image's entire command, as with docker
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
        document["mounts"].append(
            mount_entry(where, "tmpfs", "tmpfs", wanted or "nosuid,nodev,noexec,mode=1777,size=64m")
        )
    _limit(linux, options)
    _set_capabilities(process, linux, options)
    if options.init:
        document["mounts"].append(mount_entry(INIT, "bind", options.busybox, "bind,ro"))
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
        held = set(CAPABILITIES)
        linux["maskedPaths"], linux["readonlyPaths"] = [], []
        linux.pop("seccomp", None)
    added, dropped = _capabilities(options.cap_add), _capabilities(options.cap_drop)
    if "ALL" in _upper(options.cap_drop):
        dropped -= added  # all except these
    held = (held | added) - dropped
    if options.privileged or options.cap_add or options.cap_drop:
        process["capabilities"] = {kind: sorted(held) for kind in ("bounding", "effective", "permitted")}


def _upper(names: Iterable[str]) -> list[str]:
    return [name.upper().removeprefix("CAP_") for name in names]


def _capabilities(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for name in _upper(names):
        if name == "ALL":
            found |= set(CAPABILITIES)
        elif f"CAP_{name}" in CAPABILITIES:
            found.add(f"CAP_{name}")
        else:
            raise UsageError(f"capability {name!r}: unknown; capabilities(7) lists them, e.g. NET_ADMIN")
    return found


def env_file(path: str) -> list[str]:
    """Read settings from a file: NAME=value per line, NAME for the caller's own value, "#" for a comment.

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

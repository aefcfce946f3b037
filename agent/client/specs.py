"""The OCI runtime specification (config.json) of a container: from defaults, an image, or a bundle.

Namespaces, mounts, masks and capabilities are those that container engines agree on: a private view of processes,
mounts, IPC and host name; no way to load modules, set the clock or reach the guest's devices.  The network namespace is
the guest's, as in every Kata guest: there is one pod in a VM.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from google.protobuf.descriptor import FieldDescriptor

from caisson.agent.client.errors import UsageError
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

READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]

#: Field renamed on the wire; the others differ in case only, and Go's decoder takes any case.
RENAMED = {"ociversion": "version"}


def keep_alive() -> list[str]:
    """Return a first process that reaps orphans and exits on SIGTERM."""
    return ["/bin/sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 2147483647 & wait $!; done"]


def default_spec(
    rootfs: str,
    args: Sequence[str] = (),
    *,
    env: Sequence[str] = (),
    cwd: str = "/",
    hostname: str = "caisson",
    terminal: bool = False,
    scratch: Sequence[str] = ("/tmp", "/run", "/root", "/home", "/var"),
) -> oci_pb2.Spec:
    """Return the spec of a container whose root is a directory of the guest, read-only but for tmpfs on ``scratch``.

    ``args`` defaults to ``keep_alive``.
    """
    mounts = [
        oci_pb2.Mount(destination=where, type=kind, source=source, options=options.split(","))
        for where, kind, source, options in MOUNTS
    ]
    mounts += [
        oci_pb2.Mount(
            destination=where,
            type="tmpfs",
            source="tmpfs",
            options=["nosuid", "nodev", "mode=1777" if where == "/tmp" else "mode=755"],
        )
        for where in scratch
    ]
    return oci_pb2.Spec(
        Version="1.2.0",
        Hostname=hostname,
        Root=oci_pb2.Root(Path=rootfs, Readonly=True),
        Mounts=mounts,
        Process=oci_pb2.Process(
            Args=list(args) or keep_alive(),
            Env=[PATH, "HOME=/root", *env],
            Cwd=cwd,
            Terminal=terminal,
            NoNewPrivileges=True,
            Capabilities=oci_pb2.LinuxCapabilities(
                Bounding=CAPABILITIES, Effective=CAPABILITIES, Permitted=CAPABILITIES
            ),
        ),
        # No pid namespace in the list: the agent decides it, and gives each container its own.
        Linux=oci_pb2.Linux(
            Namespaces=[oci_pb2.LinuxNamespace(Type=kind) for kind in ("mount", "ipc", "uts", "cgroup")],
            MaskedPaths=MASKED,
            ReadonlyPaths=READONLY,
        ),
    )


def writable_spec(
    args: Sequence[str], *, env: Sequence[str] = (), user: str = "", cwd: str = "/", terminal: bool = False
) -> oci_pb2.Spec:
    """Return the spec of a container whose root is writable and set when it is created; ``user`` is USER[:GROUP].

    The last of several settings of one variable counts.
    """
    spec = default_spec("", args, cwd=cwd, terminal=terminal, scratch=())
    settings = dict(setting.partition("=")[::2] for setting in (PATH, *env))
    del spec.Process.Env[:]
    spec.Process.Env.extend(f"{name}={value}" for name, value in settings.items())
    spec.Process.User.Username = user or "0"
    spec.Process.NoNewPrivileges = False  # su and sudo are of use in an image that has them
    spec.Root.Readonly = False
    return spec


class ImageConfig(Protocol):
    """The configuration of a container image; image.containers.documents has it."""

    @property
    def env(self) -> Sequence[str]: ...

    @property
    def user(self) -> str: ...

    @property
    def workdir(self) -> str: ...

    def words(self, given: Sequence[str]) -> list[str]:
        """Return the program and its arguments; ``given`` replaces the image's command."""


def image_spec(
    config: ImageConfig,
    bundle: Mapping[str, Any],
    words: Sequence[str],
    *,
    env: Sequence[str],
    user: str,
    cwd: str,
    terminal: bool,
) -> oci_pb2.Spec:
    """Return the spec of an image, or of a bundle if its config.json is not empty; options override both.

    Raises UsageError.
    """
    if not bundle:
        return writable_spec(
            config.words(words),
            env=[*terminal_env(terminal), *config.env, *env],
            user=user or config.user,
            cwd=cwd or config.workdir,
            terminal=terminal,
        )
    spec = spec_from_bundle(dict(bundle))
    process = spec.Process
    if words:
        process.Args[:] = words
    process.Env.extend(env)
    process.Terminal |= terminal
    process.User.Username = user or process.User.Username
    process.Cwd = cwd or process.Cwd
    return spec


def terminal_env(terminal: bool) -> list[str]:
    """Return TERM for a program on a terminal, the caller's own."""
    return [f"TERM={os.environ.get('TERM', 'xterm')}"] if terminal else []


def user_ids(text: str) -> tuple[int, int]:
    """Parse uid[:gid]; the group defaults to 0.  Raises UsageError."""
    uid, _, gid = text.partition(":")
    if not uid.isascii() or not uid.isdecimal() or (gid and not (gid.isascii() and gid.isdecimal())):
        raise UsageError(f"--user {text!r}: is not a number; give UID or UID:GID")
    return int(uid), int(gid or 0)


def check_settings(env: Iterable[str]) -> None:
    """Check that settings are NAME=value.  Raises UsageError."""
    for setting in env:
        if "=" not in setting:
            raise UsageError(f"--env {setting!r}: is not NAME=value; for example TERM=xterm")


def spec_from_bundle(document: dict[str, Any]) -> oci_pb2.Spec:
    """Return the spec of a bundle's config.json; pid and network namespace, cgroup and root are the guest's.

    Fields that the wire lacks, or that only mean something on the host, are refused by name.  Raises UsageError.
    """
    spec = oci_pb2.Spec()
    _fill(spec, document, "")
    if not spec.Process.Args:
        raise UsageError("config.json: process.args: empty; name a program")
    for number, mount in enumerate(spec.Mounts):
        if mount.type == "bind" or {"bind", "rbind"} & set(mount.options):
            place = f"config.json: mounts[{number}]"
            raise UsageError(f"{place}: bind source {mount.source} is a path of the host; share it with --volume")
    kept = [one for one in spec.Linux.Namespaces if one.Type not in ("pid", "network")]
    del spec.Linux.Namespaces[:]
    spec.Linux.Namespaces.extend(kept)
    spec.Linux.CgroupsPath = ""
    return spec


def _fill(message: Any, document: Any, where: str) -> None:
    if not isinstance(document, dict):
        raise UsageError(f"config.json: {where or 'document'} must be an object")
    fields = {str(field.name).lower(): field for field in message.DESCRIPTOR.fields}
    for name, value in document.items():
        field = fields.get(RENAMED.get(name.lower(), name.lower()))
        place = f"{where}.{name}" if where else name
        if field is None:
            raise UsageError(f"config.json: {place}: not supported in a guest")
        if value is not None:
            _set(message, field, value, place)


def _set(message: Any, field: FieldDescriptor, value: Any, place: str) -> None:
    target = getattr(message, field.name)
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    if field.is_repeated and not isinstance(value, dict if is_map else list):
        raise UsageError(f"config.json: {place} must be {'an object' if is_map else 'a list'}")
    try:
        if field.message_type is None:
            if field.is_repeated:
                target.extend(value)
            else:
                setattr(message, field.name, value)
        elif is_map:
            for key, one in value.items():
                target[key] = one
        elif field.is_repeated:
            for number, one in enumerate(value):
                _fill(target.add(), one, f"{place}[{number}]")
        else:
            target.SetInParent()
            _fill(target, value, place)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"config.json: {place}: {error}") from None

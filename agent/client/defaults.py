"""The container that a command gets when nobody says otherwise.

Namespaces, mounts, masks and capabilities are those that container engines agree on: a private view of processes,
mounts, IPC and host name; no way to load modules, set the clock or reach the guest's devices.  The network namespace is
the guest's, as in every Kata guest: there is one pod in a VM.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def keep_alive() -> list[str]:
    """A first process that lives until it is told to stop and reaps what the others leave to it."""
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
    """The OCI spec of a container whose root is a directory of the guest, read-only but for tmpfs on ``scratch``.

    ``args`` defaults to a first process that only waits (``keep_alive``).
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

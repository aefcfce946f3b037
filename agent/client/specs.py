"""The OCI configuration (config.json) of a container: defaults and confinement.

Namespaces, mounts, masks and capabilities are those that container engines agree on: a private view of processes,
mounts, IPC and host name; no way to load modules, set the clock or reach the guest's devices.  The network namespace is
the guest's, as in every Kata guest: a VM holds one pod.

Specs are decoded config.json documents; strings that are not UTF-8 are as from os.fsdecode().
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from caisson.agent.base.syscalls import CAPABILITIES
from caisson.agent.client import bundles, seccomp
from caisson.agent.client.caller import PATH, ROOT

if TYPE_CHECKING:
    from caisson.proto.kata1 import oci_pb2

#: Docker's default set (moby profiles), without CAP_MKNOD: the runtime creates /dev.
DEFAULT_CAPABILITIES = sorted(bundles.PERMITTED_CAPABILITIES - {"CAP_MKNOD"})

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

#: Default limit of a container's processes and threads, and its share of the guest's memory.
PIDS_LIMIT = 2048
MEMORY_SHARE = 0.75

Document = dict[str, Any]


def keep_alive() -> list[str]:
    """Return an init command that reaps orphans and exits on SIGTERM."""
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
    """Return the spec of a container whose root is a directory in the guest, read-only except for tmpfs on ``scratch``.

    ``args`` defaults to ``keep_alive``.
    """
    mounts = [mount_entry(where, kind, source, options) for where, kind, source, options in MOUNTS]
    mounts += [mount_entry(where, "tmpfs", "tmpfs", _scratch_options(where)) for where in scratch]
    process = {
        "args": list(args) or keep_alive(),
        "env": [PATH, "HOME=/root", *env],
        "cwd": cwd,
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "noNewPrivileges": True,
        "capabilities": {kind: list(DEFAULT_CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
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
    args: Sequence[str], busybox: str, *, env: Sequence[str] = (), cwd: str = "/", user: Mapping[str, Any] = ROOT
) -> Document:
    """Return the spec of a program confined only by the guest, in its root, which the caller sets.

    /proc shows all the guest's processes.  In PATH the guest's packages come before busybox.
    """
    return {
        "ociVersion": "1.2.0",
        "root": {"path": "", "readonly": False},
        "mounts": [mount_entry("/dev", "bind", "/dev", "rbind")],  # so that nothing is created in it
        "process": {
            "args": list(args),
            "env": [f"{PATH}:{busybox}/bin", "HOME=/", *env],
            "cwd": cwd,
            "user": dict(user),
            "capabilities": {kind: list(CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
        },
        "linux": {"namespaces": [{"type": kind} for kind in ("mount", "ipc", "uts")]},
    }


def mount_entry(destination: str, kind: str, source: str, options: str) -> Document:
    """Return an entry of `mounts`; ``options`` are separated by commas."""
    return {"destination": destination, "type": kind, "source": source, "options": options.split(",")}


def _scratch_options(where: str) -> str:
    """Return the options of a scratch file system.

    A default container's total is below MEMORY_SHARE: filling them causes ENOSPC, not an OOM kill.
    """
    return "nosuid,nodev," + ("mode=1777,size=45%" if where == "/tmp" else "mode=755,size=7%")


def default_spec(rootfs: str, args: Sequence[str] = (), **options: Any) -> oci_pb2.Spec:
    """Return `container_document` in Kata 1.x wire format, which has no field for a filter's errno."""
    from caisson.agent.client.wire_specs import to_wire  # late: commands send JSON

    return to_wire(container_document(rootfs, args, **options))


def confine(document: Document, guest_memory: int, architecture: str = "amd64", cpus: int = 1) -> Document:
    """Fill in what a spec leaves out: Docker's system call filter, masks, and limits on processes and memory.

    ``guest_memory`` is in bytes; 0 if unknown, in which case the guest may not support limits either.
    ``cpus`` is the guest's maximum.
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

"""Rewrite a container's host configuration for the guest: paths become the share's, and host references are removed.

Source: OCI runtime specification 1.2, config.md and config-linux.md.
"""

from __future__ import annotations

import copy
import os
import stat
from pathlib import Path
from typing import Any

from caisson.agent.base.mountinfo import mount_points, mounts
from caisson.agent.shim.launch import group_in
from caisson.proto.contract import GUEST_SHARED, GUEST_SHM
from caisson.proto.from_json import fill
from caisson.proto.record import Record

#: Fields that are meaningful only on the host.
HOST_FIELDS = ("hooks", "vm", "windows", "solaris", "zos", "freebsd")
HOST_PROCESS_FIELDS = ("apparmorProfile", "selinuxLabel")

#: Limits that name what is the host's: its devices, interfaces, and numbers of CPUs.
HOST_RESOURCES = ("blockIO", "network", "rdma", "devices")
HOST_CPU = ("cpus", "mems")

#: Limits that only cgroup v1 has, and the host's may be: with cgroup v2, as in a guest, engines and runc ignore them.
V1_MEMORY = ("kernel", "kernelTCP", "swappiness", "disableOOMKiller")

#: Options of a bind mount that receives later mounts.
PROPAGATED = {"shared", "rshared", "slave", "rslave"}

#: Devices that are the same in every kernel (Documentation/admin-guide/devices.txt): a guest has its own.  Files are
#: commonly masked with /dev/null.
COMMON_DEVICES = {
    os.makedev(1, minor): f"/dev/{name}"
    for minor, name in ((3, "null"), (5, "zero"), (7, "full"), (8, "random"), (9, "urandom"))
}

#: Bytes of a pod's shared memory, if the engine has made none.
SHM_SIZE = 64 << 20

#: Namespaces of a container's own; the agent decides about pid.
OWN_NAMESPACES = ("mount", "ipc", "uts", "cgroup")


class UnsupportedSpec(Exception):
    """The configuration needs something of the host that no guest has; the text names it."""


class Volume(Record):
    """A host directory or file that a container gets at ``destination``: ``name`` in the share."""

    source: str
    name: str
    recursive: bool
    destination: str = ""


class GuestSpec(Record):
    """``document`` is the configuration for the guest; ``volumes`` must be in the share before it is created."""

    document: dict[str, Any]
    volumes: tuple[Volume, ...]


def guest_spec(document: dict[str, Any], container_id: str) -> GuestSpec:
    """Rewrite a configuration for the guest.  Raises UnsupportedSpec, naming the field."""
    document = copy.deepcopy(document)
    for name in HOST_FIELDS:
        document.pop(name, None)
    process = document.get("process") or {}
    for name in HOST_PROCESS_FIELDS:
        process.pop(name, None)
    root = document.get("root") or {}
    document["root"] = {"path": f"{GUEST_SHARED}/{container_id}/rootfs", "readonly": bool(root.get("readonly"))}
    volumes: list[Volume] = []
    document["mounts"] = [
        mount for asked in document.get("mounts") or () for mount in _mounts(asked, container_id, volumes)
    ]
    if group_in(document) in ("", container_id):
        _refuse_other_containers(document.get("linux") or {})
    _rewrite_linux(document.get("linux") or {})
    return GuestSpec(document, tuple(volumes))


def _mounts(mount: dict[str, Any], container_id: str, volumes: list[Volume]) -> list[dict[str, Any]]:
    """Rewrite a mount: a bind mount's source becomes a path in the share."""
    options = mount.get("options") or []
    if mount.get("type") != "bind" and not {"bind", "rbind"} & set(options):
        return [mount]
    source, destination = str(mount.get("source", "")), str(mount.get("destination", ""))
    if _is_shm(mount):
        return [{**mount, "source": GUEST_SHM}]
    if source == "/sys/fs/cgroup":  # the host's: the container's own is in the guest
        kept = [option for option in options if option not in ("bind", "rbind")]
        return [{**mount, "type": "cgroup", "source": "cgroup", "options": kept}]
    try:
        status = Path(source).stat()
    except OSError as error:
        raise UnsupportedSpec(f"mounts: {source}: {(error.strerror or '').lower()}") from error
    mode = status.st_mode
    kept = [option for option in options if option not in PROPAGATED]
    if stat.S_ISCHR(mode) and status.st_rdev in COMMON_DEVICES:
        return [{**mount, "source": COMMON_DEVICES[status.st_rdev], "options": kept}]
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        kind = "socket" if stat.S_ISSOCK(mode) else "device" if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else "FIFO"
        raise UnsupportedSpec(f"mounts: {source}: a {kind} of the host cannot be shared with a guest")
    # A guest has one mount of what the host binds recursively: `ro` would be that of the mounts below, too.  And while
    # such a copy of a mount point is in the host's namespace, its owner cannot remove it: rmdir(2), EBUSY.
    apart = "rbind" in options and bool({"ro", "rro"} & set(options)) and not PROPAGATED & set(options)
    volume = Volume(source, f"volume{len(volumes)}", "rbind" in options and not apart, destination)
    volumes.append(volume)
    made = [{**mount, "type": "bind", "source": f"{GUEST_SHARED}/{container_id}/{volume.name}", "options": kept}]
    for below in _submounts(source) if apart else ():
        again = ["bind", *(option for option in kept if option not in ("rbind", "ro"))]
        place = {"destination": f"{destination}/{below}", "type": "bind", "source": f"{source}/{below}"}
        made += _mounts({**place, "options": again}, container_id, volumes)
    return made


def _is_shm(mount: dict[str, Any]) -> bool:
    """Return whether a mount is the shared memory that the engine has made, a tmpfs named shm, and not a volume."""
    if mount.get("destination") != "/dev/shm":
        return False
    source = os.path.realpath(str(mount.get("source", "")))
    return any((point, name) == (source, "shm") for point, _, name, _ in mounts())


def shm_size(document: dict[str, Any]) -> int:
    """Return the bytes of a pod's shared memory."""
    for mount in document.get("mounts") or ():
        if _is_shm(mount):
            status = os.statvfs(mount["source"])
            return status.f_blocks * status.f_frsize
    return SHM_SIZE


def _submounts(source: str) -> list[str]:
    """Return the mount points below a directory, relative to it, except those of sockets and devices."""
    top = Path(source).resolve()
    points = {Path(point).relative_to(top) for point in mount_points(str(top)) if point != str(top)}
    return sorted(str(point) for point in points if (top / point).is_dir() or (top / point).is_file())


def _refuse_other_containers(linux: dict[str, Any]) -> None:
    """Refuse the namespaces of a container of another pod: those of its processes, not a pod's network by its name."""
    for one in linux.get("namespaces") or []:
        kind, path = str(one.get("type")), str(one.get("path") or "")
        if path.startswith("/proc/") and kind in ("network", "pid", "ipc", "uts"):
            text = "another container's namespace cannot be joined, as that is not in this VM; use a pod"
            raise UnsupportedSpec(f"linux.namespaces: {kind}: {text}")


def _rewrite_linux(linux: dict[str, Any]) -> None:
    namespaces = linux.get("namespaces") or []
    kinds = {one.get("type") for one in namespaces}
    if "user" in kinds:
        raise UnsupportedSpec("linux.namespaces: user namespaces are not supported; the VM isolates the container")
    if "network" not in kinds:
        raise UnsupportedSpec("linux.namespaces: the host's network cannot be joined; use a network or `none`")
    if "pid" not in kinds:
        raise UnsupportedSpec("linux.namespaces: the host's pid namespace cannot be joined")
    if "ipc" not in kinds:
        raise UnsupportedSpec("linux.namespaces: the host's ipc namespace cannot be joined")
    linux["namespaces"] = [{"type": kind} for kind in OWN_NAMESPACES if kind in kinds or kind == "mount"]
    resources = linux.get("resources") or {}
    linux["resources"] = guest_resources(resources)
    if _is_privileged(resources):
        linux.pop("devices", None)  # the host's: the guest has its own
        linux["resources"]["devices"] = [{"allow": True, "type": "a", "access": "rwm"}]
    for device in linux.get("devices") or ():
        raise UnsupportedSpec(
            f"linux.devices: {device.get('path')}: a device of the host has no equivalent in the guest"
        )
    for name in ("mountLabel", "intelRdt", "uidMappings", "gidMappings"):
        linux.pop(name, None)


def guest_resources(resources: dict[str, Any]) -> dict[str, Any]:
    """Return the limits that apply in a guest."""
    left: dict[str, Any] = {name: value for name, value in resources.items() if name not in HOST_RESOURCES}
    for part, names in (("cpu", HOST_CPU), ("memory", V1_MEMORY)):
        if left.get(part):
            left[part] = {name: value for name, value in left[part].items() if name not in names}
    return left


def _is_privileged(resources: dict[str, Any]) -> bool:
    """Return whether every device is allowed, as engines write for --privileged."""
    return any(
        rule.get("allow") and rule.get("type", "a") in ("", "a") and rule.get("major") is None
        for rule in resources.get("devices") or ()
    )


def shares_pid_namespace(document: dict[str, Any]) -> bool:
    """Return whether a container joins the pid namespace of its pod."""
    namespaces = (document.get("linux") or {}).get("namespaces") or []
    return any(one.get("type") == "pid" and one.get("path") for one in namespaces)


def network_namespace(document: dict[str, Any]) -> str:
    """Return the path of the network namespace that a configuration joins; empty for a new one."""
    namespaces = (document.get("linux") or {}).get("namespaces") or []
    return next((str(one.get("path") or "") for one in namespaces if one.get("type") == "network"), "")


def fill_known(message: Any, document: dict[str, Any]) -> None:
    """Fill a message from a JSON object, without the fields that the wire lacks, as runtimes ignore unknown ones.

    Raises FieldError.
    """
    fill(message, document, unknown=lambda field: None)

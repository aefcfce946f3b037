"""The part of a plan that makes a container's file system: mounts, devices, links, and what is read-only in the end."""

from __future__ import annotations

import os.path
from stat import S_IFBLK, S_IFCHR, S_IFIFO
from struct import pack

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Device
from caisson.agent.libcontainer.plan import bootstrap as wire
from caisson.agent.libcontainer.plan import mount_options as mountopts
from caisson.agent.libcontainer.plan.wire import (
    DEVICE,
    MOUNT,
    MOUNT_BIND,
    MOUNT_COPY_UP,
    MOUNT_ORDINARY_DIR,
    MOUNT_OVER_PROC_FILE,
    MOUNT_RECURSIVE,
    REMOUNT,
    ROOT_PROPAGATION,
    ROOT_READONLY,
    SYMLINK,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from caisson.agent.libcontainer.config.spec import Mount, Spec

    Mounts = Iterable[tuple[str, Mount]]

DEFAULT_DEVICES = tuple(
    Device(path=f"/dev/{name}", type="c", major=major, minor=minor, file_mode=0o666)
    for name, major, minor in (
        ("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0),
    )
)  # fmt: skip
LINKS = (
    ("pts/ptmx", "/dev/ptmx", True),
    ("/proc/self/fd", "/dev/fd", False),
    ("/proc/self/fd/0", "/dev/stdin", False),
    ("/proc/self/fd/1", "/dev/stdout", False),
    ("/proc/self/fd/2", "/dev/stderr", False),
)
# What lxcfs and the like put over files of proc; everything else below /proc is out of bounds for mounts.
PROC_FILES = {
    f"/proc/{name}"
    for name in (
        "cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "slabinfo", "sys/kernel/ns_last_pid",
        "sys/crypto/fips_enabled",
    )
}  # fmt: skip
FILE_TYPES = {"c": S_IFCHR, "u": S_IFCHR, "b": S_IFBLK, "p": S_IFIFO}


def filesystem(
    spec: Spec,
    bundle: Path,
    mounts: Mounts,
    links: Iterable[tuple[str, str]],
    procfs: str | None,
    *,
    devices_bound: bool,
) -> Iterable[bytes]:
    """Mounts, device nodes and links, those of /dev among them, in this order."""
    dev_is_bound = False
    for where, mount in mounts:
        step, bound = _mount(mount, where, bundle, procfs)
        dev_is_bound |= bound and os.path.normpath(mount.destination) == "/dev"
        yield step
    devices = {device.path: device for device in DEFAULT_DEVICES}
    devices |= {absolute(device.path, "linux.devices"): device for device in spec.linux.devices}
    devices.pop("/dev/ptmx", None)  # the link below
    for path, device in devices.items():
        if dev_is_bound and path.startswith("/dev/"):
            continue  # a bound /dev is the host's business: its nodes are there already
        mode = FILE_TYPES[device.type] | device.file_mode
        numbers = (device.major, device.minor, device.uid, device.gid, devices_bound)
        yield wire.attribute(DEVICE, pack("=6I", mode, *numbers) + texts(path))
    for target, path, replaced in (*LINKS, *((target, path, False) for target, path in links)):
        yield wire.attribute(SYMLINK, pack("=I", replaced) + texts(target, path))
    if os.path.exists("/proc/kcore"):  # noqa: PTH110 - pathlib is not worth its import here
        yield wire.attribute(SYMLINK, pack("=I", 0) + texts("/proc/kcore", "/dev/core"))


def _mount(mount: Mount, where: str, bundle: Path, procfs: str | None) -> tuple[bytes, bool]:
    """One MOUNT step, and whether it is a bind mount."""
    target = absolute(mount.destination, f"{where}.destination")
    options = mountopts.parse(mount.options, type_=mount.type, where=f"{where}.options")
    source, type_, bind = mount.source, mount.type, options.bind
    flags, set_, data = MOUNT_COPY_UP if options.copy_up else 0, options.set, options.data
    if target == "/":
        raise SpecError(f"{where}.destination", "must not be the container's root")
    if target in PROC_FILES:
        flags |= MOUNT_OVER_PROC_FILE
    elif target.startswith("/proc/"):
        raise SpecError(f"{where}.destination", f"{target} is inside /proc")
    elif target == "/proc" and (bind or type_ != "proc"):
        raise SpecError(f"{where}.destination", "only a proc filesystem can be mounted on /proc")
    if not bind and type_ == "proc" and procfs != "":
        # A new one would be that of the pid namespace where it is made, and that is not yet the one that is joined.
        if procfs is None:
            raise SpecError(where, "a procfs of the pid namespace that is joined is not at hand")
        if data:
            raise SpecError(f"{where}.options", f"{data[0]!r} cannot be asked for in a shared pid namespace")
        flags |= MOUNT_ORDINARY_DIR
        bind, source = True, procfs
    if bind:
        if not source:
            raise SpecError(f"{where}.source", "is missing")
        source = os.path.join(bundle, source)  # noqa: PTH118 - absolute, or below the bundle (OCI mounts)
        flags |= MOUNT_BIND | (MOUNT_RECURSIVE if options.recursive else 0)
    else:
        if not type_:
            raise SpecError(f"{where}.type", "is missing")
        flags |= MOUNT_ORDINARY_DIR if type_ in ("proc", "sysfs") else 0
        set_ &= ~(mountopts.RDONLY if _is_late_readonly(type_, set_) else 0)
    head = pack(
        "=IIQQQQ", flags, options.propagation, set_, options.clear, options.recursive_set, options.recursive_clear
    )
    return wire.attribute(MOUNT, head + texts(target, source or type_, type_, *data), where), bind


def _is_late_readonly(type_: str, set_: int) -> bool:
    """A read-only tmpfs gets so last: later mounts and devices need their mount points made in it."""
    return type_ == "tmpfs" and bool(set_ & mountopts.RDONLY)


def late_readonly(spec: Spec, mounts: Mounts) -> Iterable[bytes]:
    for where, mount in mounts:
        options = mountopts.parse(mount.options, type_=mount.type, where=f"{where}.options")
        if not options.bind and _is_late_readonly(mount.type, options.set):
            path = os.path.normpath(mount.destination)
            yield wire.attribute(REMOUNT, pack("=Q", mountopts.RDONLY) + texts(path))
    if spec.root is not None and spec.root.readonly:
        yield wire.truth(ROOT_READONLY, True)


def root_propagation(name: str) -> Iterable[bytes]:
    if not name:
        return
    if name not in mountopts.PROPAGATION:
        raise SpecError("linux.rootfsPropagation", f"{name!r} is not a propagation type")
    yield wire.number(ROOT_PROPAGATION, mountopts.PROPAGATION[name])


def texts(*values: str) -> bytes:
    return b"".join(wire.encode(value) + b"\0" for value in values)


def absolute(path: str, where: str) -> str:
    """A path of the container, cleaned.  It is resolved inside the container's root, whatever it says."""
    if not path.startswith("/"):
        raise SpecError(where, f"{path!r} must be an absolute path")
    return os.path.normpath("/" + path.lstrip("/"))

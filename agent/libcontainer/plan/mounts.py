"""Plan a container's file system: mounts, devices, links, and what becomes read-only last.

Options of fstab(5) become attributes of the mount API (mount_setattr(2)), propagation and data, once for every mount.
The type `cgroup` means whichever cgroups the machine has: version 2 is one mount; version 1 is a small tmpfs with a
directory for every hierarchy, and links for controllers that share one (config-linux.md, "Control groups").  Each of
these gets the options of the one entry: read-only applies to all of them (CVE-2023-25809).
"""

from __future__ import annotations

import os.path
from stat import S_IFBLK, S_IFCHR, S_IFIFO
from struct import pack

from caisson.agent.base.syscalls import (
    MOUNT_ATTR__ATIME,
    MOUNT_ATTR_NOATIME,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NODIRATIME,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_NOSYMFOLLOW,
    MOUNT_ATTR_RDONLY,
    MOUNT_ATTR_STRICTATIME,
    MS_PRIVATE,
    MS_REC,
    MS_SHARED,
    MS_SLAVE,
    MS_UNBINDABLE,
)
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Device, Mount
from caisson.agent.libcontainer.plan import wire
from caisson.agent.libcontainer.plan.users import in_user_namespace
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from caisson.agent.libcontainer.config.spec import Spec

#: Option: (attributes to set, attributes to clear).  With an `r` prefix, it also applies to all mounts below.
ATTRIBUTES: dict[str, tuple[int, int]] = {
    "ro": (MOUNT_ATTR_RDONLY, 0), "rw": (0, MOUNT_ATTR_RDONLY),
    "nosuid": (MOUNT_ATTR_NOSUID, 0), "suid": (0, MOUNT_ATTR_NOSUID),
    "nodev": (MOUNT_ATTR_NODEV, 0), "dev": (0, MOUNT_ATTR_NODEV),
    "noexec": (MOUNT_ATTR_NOEXEC, 0), "exec": (0, MOUNT_ATTR_NOEXEC),
    "noatime": (MOUNT_ATTR_NOATIME, MOUNT_ATTR__ATIME), "atime": (0, MOUNT_ATTR__ATIME),
    "relatime": (0, MOUNT_ATTR__ATIME), "norelatime": (0, MOUNT_ATTR__ATIME),
    "strictatime": (MOUNT_ATTR_STRICTATIME, MOUNT_ATTR__ATIME), "nostrictatime": (0, MOUNT_ATTR__ATIME),
    "nodiratime": (MOUNT_ATTR_NODIRATIME, 0), "diratime": (0, MOUNT_ATTR_NODIRATIME),
    "nosymfollow": (MOUNT_ATTR_NOSYMFOLLOW, 0), "symfollow": (0, MOUNT_ATTR_NOSYMFOLLOW),
}  # fmt: skip

PROPAGATION: dict[str, int] = {
    "shared": MS_SHARED, "rshared": MS_SHARED | MS_REC,
    "slave": MS_SLAVE, "rslave": MS_SLAVE | MS_REC,
    "private": MS_PRIVATE, "rprivate": MS_PRIVATE | MS_REC,
    "unbindable": MS_UNBINDABLE, "runbindable": MS_UNBINDABLE | MS_REC,
}  # fmt: skip

REFUSED = {
    "loop": "is not supported: attach the image to a loop device first",
}
IDMAP = {"idmap": wire.MOUNT_IDMAP, "ridmap": wire.MOUNT_IDMAP | wire.MOUNT_IDMAP_RECURSIVE}
#: Options of mount(8) that are defaults, or mean nothing to the kernel.
WITHOUT_EFFECT = ("", "defaults", "acl", "noacl", "iversion", "noiversion", "loud", "silent")
DATA_MAX = 255  # maximum bytes of a value for fsconfig(2)

CGROUP_TYPES = ("cgroup", "cgroup2")
CGROUPS = "/sys/fs/cgroup"
#: File systems whose files are labelled by policy, whoever mounts them.
WITHOUT_LABEL = ("proc", "sysfs", *CGROUP_TYPES)
DEFAULT_DEVICES = tuple(
    Device(path=f"/dev/{name}", type="c", major=major, minor=minor, file_mode=0o666)
    for name, major, minor in (
        ("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0),
    )
)  # fmt: skip
#: Links in /dev: target, path, whether it replaces a file.
LINKS = (
    ("pts/ptmx", "/dev/ptmx", True),
    ("/proc/self/fd", "/dev/fd", False),
    ("/proc/self/fd/0", "/dev/stdin", False),
    ("/proc/self/fd/1", "/dev/stdout", False),
    ("/proc/self/fd/2", "/dev/stderr", False),
)
#: Files of proc that lxcfs and the like mount over; mounts elsewhere below /proc are not allowed.
PROC_FILES = {
    f"/proc/{name}"
    for name in (
        "cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg", "slabinfo", "sys/kernel/ns_last_pid",
        "sys/crypto/fips_enabled",
    )
}  # fmt: skip
FILE_TYPES = {"c": S_IFCHR, "u": S_IFCHR, "b": S_IFBLK, "p": S_IFIFO}


class MountOptions(Record):
    """A mount's parsed options; `data` is passed to the file system unchanged."""

    bind: bool
    recursive: bool = False
    set: int = 0
    clear: int = 0
    recursive_set: int = 0
    recursive_clear: int = 0
    propagation: int = 0
    data: tuple[str, ...] = ()
    copy_up: bool = False
    remount: bool = False  # attributes that are not given are cleared, as runc does for bind mounts with any
    idmap: int = 0  # wire.MOUNT_IDMAP, and MOUNT_IDMAP_RECURSIVE


def parse_options(options: tuple[str, ...], *, type_: str, where: str) -> MountOptions:
    """Parse options; later ones win, as in mount(8).  Raises SpecError for unsupported ones."""
    bind, recursive, copy_up, remount, relatime, idmap = type_ == "bind", False, False, False, False, 0
    set_ = clear = recursive_set = recursive_clear = propagation = 0
    flagged = False
    data: list[str] = []
    for option in options:
        if option in ("bind", "rbind"):
            bind, recursive = True, recursive or option == "rbind"
        elif option in ATTRIBUTES:
            on, off = ATTRIBUTES[option]
            set_, clear = (set_ & ~off) | on, (clear & ~on) | off
            relatime = option == "relatime" or (relatime and not off & MOUNT_ATTR__ATIME)
            flagged = True
        elif option.startswith("r") and option[1:] in ATTRIBUTES:
            on, off = ATTRIBUTES[option[1:]]
            recursive_set, recursive_clear = (recursive_set & ~off) | on, (recursive_clear & ~on) | off
        elif option in PROPAGATION:
            if propagation not in (0, PROPAGATION[option]):
                raise SpecError(where, f"{option!r} is a second propagation type, and a mount has one")
            propagation = PROPAGATION[option]
        elif option == "remount":
            remount = True
        elif option in IDMAP:
            idmap = IDMAP[option]
        elif option.partition("=")[0] in REFUSED:
            raise SpecError(where, f"{option!r} {REFUSED[option.partition('=')[0]]}")
        elif option == "tmpcopyup" and type_ == "tmpfs":
            copy_up = True
        elif option == "tmpcopyup":
            raise SpecError(where, f"{option!r} is only for tmpfs")
        elif option not in WITHOUT_EFFECT:
            data.append(option)
    for option in data:
        if len(option.partition("=")[2]) > DATA_MAX:
            name = option.partition("=")[0]
            raise SpecError(where, f"the value of {name!r} is longer than the {DATA_MAX} bytes that fit")
    # A bind mount has no file system to pass data to, and the kernel ignores it.
    if bind:
        clear = _bind_clear(set_, clear, relatime)
        remount = flagged
    if idmap and not bind:
        raise SpecError(where, "id-mapped mounts must be bind mounts")
    return MountOptions(
        bind,
        recursive,
        set_,
        clear,
        recursive_set,
        recursive_clear,
        propagation,
        () if bind else tuple(data),
        copy_up,
        remount,
        idmap,
    )


def _bind_clear(set_: int, clear: int, relatime: bool) -> int:
    """Return the flags that a bind mount clears: those of access times only if another atime mode is set."""
    clear &= ~(MOUNT_ATTR__ATIME | MOUNT_ATTR_NODIRATIME)
    if relatime or set_ & (MOUNT_ATTR__ATIME | MOUNT_ATTR_NODIRATIME):
        clear |= MOUNT_ATTR__ATIME | (MOUNT_ATTR_NODIRATIME & ~set_)
    return clear


class PlannedMount(Record):
    """A planned mount: `where` is its field, `target` a cleaned path in the container."""

    where: str
    target: str
    source: str
    type: str
    options: MountOptions
    uid_map: str = ""  # as in /proc/PID/uid_map; "" for those of the joined user namespace
    gid_map: str = ""

    @property
    def late_readonly(self) -> bool:
        """Whether it becomes read-only last: in a tmpfs, mount points of later mounts and devices must still be
        created.
        """
        return not self.options.bind and self.type == "tmpfs" and bool(self.options.set & MOUNT_ATTR_RDONLY)


class FileSystem:
    """A container's mounts, devices and links, as steps of its plan.  All raise SpecError."""

    def __init__(
        self,
        spec: Spec,
        bundle: str,
        cgroups: Mapping[str, str],
        types: Iterable[str],
        rootfs: str = "/",
        *,
        on_host: bool = False,
    ) -> None:
        """`cgroups` are the container's directories by controllers, `types` its namespaces.

        A destination that begins with `rootfs` is taken to be below it, as by runc.
        """
        self._spec = spec
        self._bundle = bundle
        self._types = frozenset(types)
        self._binds_devices = "user" in self._types or (on_host and in_user_namespace())
        self._links: list[tuple[str, str]] = []
        self.mounts: list[PlannedMount] = []
        for index, mount in enumerate(spec.mounts):
            planned = self._with_label(self._with_id_maps(plan_mount(mount, f"mounts[{index}]")))
            if rootfs != "/" and planned.target.startswith(f"{rootfs}/"):
                planned = planned.but(target=planned.target.removeprefix(rootfs))
            is_cgroup = planned.type in CGROUP_TYPES and not planned.options.bind
            if is_cgroup and on_host and not cgroups and "cgroup" not in self._types:
                self.mounts.append(_bind_recursive(planned, CGROUPS))
            elif is_cgroup:
                some, links = expand_cgroups(planned, cgroups, namespace="cgroup" in self._types)
                self.mounts += some
                self._links += links
            else:
                self.mounts.append(planned)

    def _with_id_maps(self, mount: PlannedMount) -> PlannedMount:
        """Return the mount with the container's own id maps, if it is id-mapped without maps."""
        if not mount.options.idmap or mount.uid_map:
            return mount
        if "user" not in self._types:
            raise SpecError(f"{mount.where}.options", "idmap needs uidMappings and gidMappings, or a user namespace")
        linux = self._spec.linux
        return mount.but(uid_map=wire.map_lines(linux.uid_mappings), gid_map=wire.map_lines(linux.gid_mappings))

    def _with_label(self, mount: PlannedMount) -> PlannedMount:
        """Return the mount with the container's SELinux context, if it is a new file system that supports one."""
        label, options = self._spec.linux.mount_label, mount.options
        if not label or options.bind or options.remount or mount.type in WITHOUT_LABEL:
            return mount
        return mount.but(options=options.but(data=(*options.data, f"context={label}")))

    def steps(self, procfs: str | None) -> Iterable[bytes]:
        """Encode mounts, device nodes and links, including those of /dev, in this order.

        `procfs` is as for `mount_step`.
        """
        for mount in self.mounts:
            yield mount_step(mount, self._bundle, procfs)
        yield from self._device_steps()
        links = () if self._dev_is_bound else LINKS
        for target, path, replaced in (*links, *((target, path, False) for target, path in self._links)):
            yield wire.attribute(wire.SYMLINK, pack("=I", replaced) + wire.texts(target, path))
        if not self._dev_is_bound and os.path.exists("/proc/kcore"):  # noqa: PTH110 - pathlib is not worth its import
            yield wire.attribute(wire.SYMLINK, pack("=I", 0) + wire.texts("/proc/kcore", "/dev/core"))

    @property
    def _dev_is_bound(self) -> bool:
        """Whether /dev is bind-mounted, and so has its own nodes and links."""
        return any(mount.options.bind and mount.target == "/dev" for mount in self.mounts)

    def _device_steps(self) -> Iterable[bytes]:
        devices = {device.path: device for device in DEFAULT_DEVICES}
        devices |= {absolute(device.path, "linux.devices"): device for device in self._spec.linux.devices}
        devices.pop("/dev/ptmx", None)  # created as a link below
        mounted = {mount.target for mount in self.mounts}  # as with runc, in place of the device
        for path, device in devices.items():
            if path in mounted or (self._dev_is_bound and path.startswith("/dev/")):
                continue
            mode = FILE_TYPES[device.type] | device.file_mode
            numbers = (device.major, device.minor, device.uid, device.gid, self._binds_devices)
            yield wire.attribute(wire.DEVICE, pack("=6I", mode, *numbers) + wire.texts(path))

    def readonly_steps(self) -> Iterable[bytes]:
        """Encode what becomes read-only last."""
        for mount in self.mounts:
            if mount.late_readonly:
                yield wire.attribute(wire.REMOUNT, pack("=Q", MOUNT_ATTR_RDONLY) + wire.texts(mount.target))
        # A mount over the root would be above it, where no path leads: as a path it is read-only itself.
        if (self._spec.root is not None and self._spec.root.readonly) or "/" in readonly_paths(self._spec):
            yield wire.truth(wire.ROOT_READONLY, True)


def readonly_paths(spec: Spec) -> list[str]:
    """Normalize linux.readonlyPaths.  Raises SpecError."""
    return [absolute(path, "linux.readonlyPaths") for path in spec.linux.readonly_paths]


def is_id_mapped(mount: Mount) -> bool:
    """Return whether a mount of the configuration has ids mapped."""
    return bool(mount.uid_mappings) or not IDMAP.keys().isdisjoint(mount.options)


def plan_mount(mount: Mount, where: str) -> PlannedMount:
    """Plan a mount of the configuration.  Raises SpecError."""
    options = parse_options(mount.options, type_=mount.type, where=f"{where}.options")
    if bool(mount.uid_mappings) != bool(mount.gid_mappings):
        raise SpecError(f"{where}.uidMappings", "go together with gidMappings")
    if mount.uid_mappings and not options.bind:
        raise SpecError(f"{where}.uidMappings", "are for bind mounts")
    if mount.uid_mappings and not options.idmap:
        options = options.but(idmap=wire.MOUNT_IDMAP)
    return PlannedMount(
        where,
        absolute(mount.destination, f"{where}.destination"),
        mount.source,
        mount.type,
        options,
        wire.map_lines(mount.uid_mappings),
        wire.map_lines(mount.gid_mappings),
    )


def mount_step(mount: PlannedMount, bundle: str, procfs: str | None) -> bytes:
    """Encode one MOUNT step.

    `procfs` is a mount of the joined pid namespace's procfs, "" if none is joined; with None nsexec creates one
    inside.  Raises SpecError.
    """
    target, options = mount.target, mount.options
    source, bind, set_ = mount.source, options.bind, options.set
    flags = options.idmap | (wire.MOUNT_COPY_UP if options.copy_up else 0)
    flags |= wire.MOUNT_REMOUNT if options.remount else 0
    if target == "/":
        raise SpecError(f"{mount.where}.destination", "must not be the container's root")
    if target in PROC_FILES:
        flags |= wire.MOUNT_OVER_PROC_FILE
    elif target.startswith("/proc/"):
        raise SpecError(f"{mount.where}.destination", f"{target} is inside /proc")
    elif target == "/proc" and bind:
        flags |= wire.MOUNT_ORDINARY_DIR  # nsexec wants the source to be a procfs
    elif target == "/proc" and mount.type != "proc" and not options.remount:
        raise SpecError(f"{mount.where}.destination", "only a proc filesystem can be mounted on /proc")
    if not bind and not options.remount and mount.type == "proc" and procfs != "":
        # A new one would belong to the pid namespace it is created in, which is not yet the joined one.
        flags |= wire.MOUNT_ORDINARY_DIR
        if procfs is None:
            flags |= wire.MOUNT_IN_CHILD
        elif options.data:
            raise SpecError(
                f"{mount.where}.options", f"{options.data[0]!r} cannot be asked for in a shared pid namespace"
            )
        else:
            bind, source = True, procfs
    if bind:
        if not source:
            raise SpecError(f"{mount.where}.source", "is missing")
        source = os.path.join(bundle, source)  # noqa: PTH118 - absolute, or below the bundle (OCI mounts)
        flags |= wire.MOUNT_BIND | (wire.MOUNT_RECURSIVE if options.recursive else 0)
    else:
        if not mount.type and not options.remount:
            raise SpecError(f"{mount.where}.type", "is missing")
        flags |= wire.MOUNT_ORDINARY_DIR if mount.type in ("proc", "sysfs") else 0
        set_ &= ~(MOUNT_ATTR_RDONLY if mount.late_readonly else 0)
    head = pack(
        "=IIQQQQ", flags, options.propagation, set_, options.clear, options.recursive_set, options.recursive_clear
    )
    texts = wire.texts(target, source or mount.type, mount.type, mount.uid_map, mount.gid_map, *options.data)
    return wire.attribute(wire.MOUNT, head + texts, mount.where)


def expand_cgroups(
    mount: PlannedMount, cgroups: Mapping[str, str], *, namespace: bool
) -> tuple[list[PlannedMount], list[tuple[str, str]]]:
    """Plan the mounts for a cgroup mount, and the links in them as (target, path).

    `cgroups` are the container's directories by controllers, "" for version 2.  In its own cgroup namespace, the file
    system itself shows the container's part; otherwise that directory is bind-mounted.  Raises SpecError.
    """
    where, options = mount.where, mount.options
    if options.data:
        raise SpecError(f"{where}.options", f"{options.data[0]!r} is not an option of a container's cgroups")
    if not namespace and not cgroups:
        raise SpecError(where, "a cgroup mount needs a cgroup namespace or a cgroup of the container's own")
    if not cgroups or set(cgroups) == {""}:
        if namespace:
            return [mount.but(type="cgroup2", source="cgroup2")], []
        return [_bind(mount, mount.target, cgroups[""])], []
    if mount.type == "cgroup2":
        raise SpecError(f"{where}.type", "the cgroups of this machine are of version 1")
    tmpfs = options.but(data=("mode=755", "size=64k"))
    mounts = [mount.but(type="tmpfs", source="tmpfs", options=tmpfs)]
    links = []
    own = options.but(propagation=0)
    for name, path in cgroups.items():
        if not name:
            continue  # version 2 beside version 1: not expected here
        one = mount.but(target=f"{mount.target}/{name.removeprefix('name=')}", options=own)
        controllers = tuple(name.split(","))
        if namespace:
            data = ("none", name) if name.startswith("name=") else controllers
            mounts.append(one.but(type="cgroup", source="cgroup", options=own.but(data=data)))
        else:
            mounts.append(_bind(one, one.target, path))
        if len(controllers) > 1:
            links += [(name, f"{mount.target}/{controller}") for controller in controllers]
    return mounts, links


def _bind(mount: PlannedMount, target: str, path: str) -> PlannedMount:
    return mount.but(target=target, type="bind", source=path, options=mount.options.but(bind=True))


def _bind_recursive(mount: PlannedMount, path: str) -> PlannedMount:
    """Bind a directory with all mounts in it, each with the same attributes."""
    options = mount.options
    return _bind(mount, mount.target, path).but(
        options=options.but(bind=True, recursive=True, recursive_set=options.set)
    )


def root_propagation(name: str) -> Iterable[bytes]:
    """Encode linux.rootfsPropagation.  Raises SpecError."""
    if not name:
        return
    if name not in PROPAGATION:
        raise SpecError("linux.rootfsPropagation", f"{name!r} is not a propagation type")
    yield wire.number(wire.ROOT_PROPAGATION, PROPAGATION[name])


def absolute(path: str, where: str) -> str:
    """Normalize a path in the container; it will be resolved inside the container's root in any case.

    Raises SpecError for one that is not absolute.
    """
    if not path.startswith("/"):
        raise SpecError(where, f"{path!r} must be an absolute path")
    return os.path.normpath("/" + path.lstrip("/"))

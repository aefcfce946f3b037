"""The OCI runtime configuration (config.json, runtime-spec 1.2, Linux) as frozen data.

`Spec.from_json` is strict: a field is either understood or rejected by a SpecError that names it.  Values (mount
options, capability names, sysctls …) are interpreted where they are used, in `plan`.
"""

from __future__ import annotations

from caisson.agent.libcontainer.config import scheduling
from caisson.agent.libcontainer.config.process import Process
from caisson.agent.libcontainer.config.reader import U32_MAX, Reader, SpecError, UnknownField
from caisson.agent.libcontainer.config.resources import Resources
from caisson.agent.libcontainer.config.scheduling import MemoryPolicy
from caisson.agent.libcontainer.config.seccomp import Seccomp
from caisson.agent.libcontainer.plan import lsm as labels
from caisson.proto.record import NOTHING, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeVar

    from caisson.agent.libcontainer.intel_rdt import IntelRdt

    T = TypeVar("T")

NAMESPACE_TYPES = ("pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time")
IFNAME_MAX = 15  # bytes of a network device's name
HOOK_SECONDS_MAX = 0x7FFF_FFFF // 1000  # poll(2) counts milliseconds


class Root(Record):
    """`root`: where the container's "/" comes from."""

    path: str
    readonly: bool = False


class Namespace(Record):
    """One of `linux.namespaces`; an empty path asks for a new one."""

    type: str
    path: str = ""


class IdMapping(Record):
    """`size` ids from `container_id` inside map to those from `host_id` outside (user_namespaces(7))."""

    container_id: int
    host_id: int
    size: int


class Mount(Record):
    """One of `mounts`, in order; `uid_mappings` and `gid_mappings` are for an id-mapped one."""

    destination: str
    source: str = ""
    type: str = ""
    options: tuple[str, ...] = ()
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()


class TimeOffset(Record):
    """Seconds and nanoseconds by which a clock of a time namespace is ahead (time_namespaces(7))."""

    secs: int
    nanosecs: int


class Device(Record):
    """One of `linux.devices`: a node to create.  `type` is c, b, u or p; `file_mode` holds permission bits."""

    path: str
    type: str
    major: int = 0
    minor: int = 0
    file_mode: int = 0o666
    uid: int = 0
    gid: int = 0


class Linux(Record):
    """`linux`: namespaces, limits, masked paths and more."""

    namespaces: tuple[Namespace, ...] = ()
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()
    time_offsets: Mapping[str, TimeOffset] = NOTHING
    devices: tuple[Device, ...] = ()
    resources: Resources | None = None
    cgroups_path: str = ""
    sysctl: Mapping[str, str] = NOTHING
    rootfs_propagation: str = ""
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    seccomp: Seccomp | None = None
    personality: int | None = None  # as for personality(2)
    memory_policy: MemoryPolicy | None = None
    net_devices: Mapping[str, str] = NOTHING  # name outside: name inside
    mount_label: str = ""  # SELinux context of new file systems
    intel_rdt: IntelRdt | None = None

    @property
    def has_new_pids(self) -> bool:
        """Whether the container gets a pid namespace of its own."""
        return any(namespace.type == "pid" and not namespace.path for namespace in self.namespaces)

    @classmethod
    def from_json(cls, value: object, where: str = "linux") -> Linux:
        """Parse `linux`.  Raises SpecError."""
        r = Reader(value, where)
        result = cls(
            namespaces=r.each("namespaces", _namespace),
            uid_mappings=r.each("uidMappings", _id_mapping),
            gid_mappings=r.each("gidMappings", _id_mapping),
            time_offsets=r.one("timeOffsets", _time_offsets) or {},
            devices=r.each("devices", _device),
            resources=r.one("resources", Resources.from_json),
            cgroups_path=r.text("cgroupsPath"),
            sysctl=r.table("sysctl"),
            rootfs_propagation=r.text("rootfsPropagation"),
            masked_paths=r.texts("maskedPaths"),
            readonly_paths=r.texts("readonlyPaths"),
            seccomp=r.one("seccomp", Seccomp.from_json),
            personality=r.one("personality", scheduling.personality),
            memory_policy=r.one("memoryPolicy", scheduling.memory_policy),
            net_devices=r.one("netDevices", _net_devices) or {},
            mount_label=r.text("mountLabel"),
            intel_rdt=r.one("intelRdt", _intel_rdt),
        )
        r.done()
        if result.mount_label and not labels.has_selinux():
            raise SpecError(r.name("mountLabel"), "this kernel has no SELinux")
        types = [namespace.type for namespace in result.namespaces]
        if len(set(types)) != len(types):
            raise SpecError(r.name("namespaces"), "names a type twice")
        return result


class Hook(Record):
    """A program of `hooks`; `timeout` in seconds."""

    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: int | None = None


class Hooks(Record):
    """`hooks` by point of the lifecycle, each list in the order in which they run."""

    prestart: tuple[Hook, ...] = ()
    create_runtime: tuple[Hook, ...] = ()
    create_container: tuple[Hook, ...] = ()
    start_container: tuple[Hook, ...] = ()
    poststart: tuple[Hook, ...] = ()
    poststop: tuple[Hook, ...] = ()


class Spec(Record):
    """A whole config.json.  `process` and `root` may be absent in one that is stored but not run."""

    oci_version: str = ""
    root: Root | None = None
    process: Process | None = None
    hostname: str = ""
    domainname: str = ""
    mounts: tuple[Mount, ...] = ()
    hooks: Hooks = Hooks()
    annotations: Mapping[str, str] = NOTHING
    linux: Linux = Linux()

    @classmethod
    def from_json(cls, value: object) -> Spec:
        """Parse a decoded config.json.  Raises SpecError naming the field that is invalid or not supported."""
        r = Reader(value, "")
        for key in ("solaris", "windows", "vm", "zos", "freebsd"):
            r.unknown(key, "is for another platform")
        result = cls(
            oci_version=r.text("ociVersion"),
            root=r.one("root", _root),
            process=r.one("process", Process.from_json),
            hostname=r.text("hostname"),
            domainname=r.text("domainname"),
            mounts=r.each("mounts", _mount),
            hooks=r.one("hooks", _hooks) or Hooks(),
            annotations=r.table("annotations"),
            linux=r.one("linux", Linux.from_json) or Linux(),
        )
        r.done()
        if result.oci_version and not result.oci_version.startswith("1."):
            raise SpecError("ociVersion", f"must be 1.x, not {result.oci_version!r}")
        return result


def ignoring_unknown(read: Callable[[], T], warn: Callable[[str], object]) -> T:
    """Read a document without its unknown fields, each of which is reported to `warn`; one that differs from a known
    field only in case is taken for that.

    Raises SpecError for an invalid field.
    """
    while True:
        try:
            return read()
        except UnknownField as field:
            warn(field.remove())


def _root(value: object, where: str) -> Root:
    r = Reader(value, where)
    root = Root(r.text("path"), r.flag("readonly"))
    r.done()
    return root


def _mount(value: object, where: str) -> Mount:
    r = Reader(value, where)
    mount = Mount(
        r.text("destination"),
        r.text("source"),
        r.text("type"),
        r.texts("options"),
        r.each("uidMappings", _id_mapping),
        r.each("gidMappings", _id_mapping),
    )
    r.done()
    return mount


def _namespace(value: object, where: str) -> Namespace:
    r = Reader(value, where)
    namespace = Namespace(r.text("type"), r.text("path"))
    r.done()
    if namespace.type not in NAMESPACE_TYPES:
        raise SpecError(r.name("type"), f"must be one of {', '.join(NAMESPACE_TYPES)}, not {namespace.type!r}")
    if namespace.path and not namespace.path.startswith("/"):
        raise SpecError(r.name("path"), f"must be an absolute path, not {namespace.path!r}")
    return namespace


def _id_mapping(value: object, where: str) -> IdMapping:
    r = Reader(value, where)
    mapping = IdMapping(r.u32("containerID"), r.u32("hostID"), r.u32("size"))
    r.done()
    return mapping


def _time_offsets(value: object, where: str) -> dict[str, TimeOffset]:
    r = Reader(value, where)
    offsets = {name: r.one(name, _time_offset) for name in ("monotonic", "boottime")}
    r.done()
    return {name: offset for name, offset in offsets.items() if offset is not None}


def _time_offset(value: object, where: str) -> TimeOffset:
    r = Reader(value, where)
    offset = TimeOffset(r.number("secs", -(1 << 62), 1 << 62) or 0, r.number("nanosecs", 0, 999_999_999) or 0)
    r.done()
    return offset


def _device(value: object, where: str) -> Device:
    r = Reader(value, where)
    mode = r.number("fileMode", 0, 0o7777)
    device = Device(
        path=r.text("path"),
        type=r.text("type"),
        major=r.number("major", 0, 0xFFF) or 0,
        minor=r.number("minor", 0, 0xF_FFFF) or 0,
        file_mode=0o666 if mode is None else mode,
        uid=r.number("uid", 0, U32_MAX - 1) or 0,
        gid=r.number("gid", 0, U32_MAX - 1) or 0,
    )
    r.done()
    if device.type not in ("c", "b", "u", "p"):
        raise SpecError(r.name("type"), f"must be c, b, u or p, not {device.type!r}")
    return device


def _net_devices(value: object, where: str) -> dict[str, str]:
    r = Reader(value, where)
    devices = {name: _net_device(r.raw(name), r.name(name)) or name for name in r.keys}
    for name in (*devices, *devices.values()):
        if not name or len(name) > IFNAME_MAX or name in (".", "..") or any(c in "/:" or c.isspace() for c in name):
            raise SpecError(where, f"invalid network device name {name!r}")
    if len(set(devices.values())) != len(devices):
        raise SpecError(where, "gives two devices one name")
    return devices


def _net_device(value: object, where: str) -> str:
    r = Reader({} if value is None else value, where)
    name = r.text("name")
    r.done()
    return name


def _intel_rdt(value: object, where: str) -> IntelRdt:
    from caisson.agent.libcontainer import intel_rdt  # late: rarely used

    return intel_rdt.from_json(value, where)


def _hooks(value: object, where: str) -> Hooks:
    r = Reader(value, where)
    points = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
    hooks = Hooks(*(r.each(point, _hook) for point in points))
    r.done()
    return hooks


def _hook(value: object, where: str) -> Hook:
    r = Reader(value, where)
    hook = Hook(r.text("path"), r.texts("args"), r.texts("env"), r.number("timeout", 1, HOOK_SECONDS_MAX))
    r.done()
    if not hook.path.startswith("/"):
        raise SpecError(r.name("path"), f"must be an absolute path, not {hook.path!r}")
    for variable in hook.env:
        if not variable.partition("=")[0] or "=" not in variable:
            raise SpecError(r.name("env"), f"{variable!r} is not of the form NAME=value")
    return hook

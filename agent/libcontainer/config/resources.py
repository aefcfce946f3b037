"""OCI `linux.resources` as data: the limits of a container (runtime-spec 1.2, config-linux.md).

A field means the same for both cgroup versions; whether a version supports it is decided where it is set.
"""

from __future__ import annotations

from caisson.agent.libcontainer.config.reader import I64_MAX, I64_MIN, U32_MAX, U64_MAX, Reader, SpecError
from caisson.proto.record import NOTHING, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypeVar

    T = TypeVar("T")

#: Maximum entries of one list: each is a program rule or a write to a file, while other calls wait.
MAX_ENTRIES = 1024
LEAF_WEIGHTS = "leaf weights went with the CFQ scheduler in Linux 5.0"
SIZE_UNITS = ("KB", "MB", "GB")


class DeviceRule(Record):
    """One line of the device allow list.  `type` is a, b or c; None numbers mean any; `access` is a subset of "rwm"."""

    allow: bool
    type: str
    major: int | None
    minor: int | None
    access: str


class MemoryLimits(Record):
    """Bytes; -1 is unlimited, None and 0 are not given.  `swap` is memory plus swap, as in cgroup v1."""

    limit: int | None = None
    reservation: int | None = None
    swap: int | None = None
    kernel: int | None = None
    kernel_tcp: int | None = None
    swappiness: int | None = None
    disable_oom_killer: bool = False
    check_before_update: bool = False


class CpuLimits(Record):
    """`shares` is relative (1024 is the default); quota, burst and periods are microseconds; `cpus`, `mems` lists."""

    shares: int | None = None
    quota: int | None = None
    burst: int | None = None
    period: int | None = None
    realtime_runtime: int | None = None
    realtime_period: int | None = None
    idle: int | None = None
    cpus: str = ""
    mems: str = ""


class BlockIO(Record):
    """Weights are 10 to 1000.  `device_weights` are by (major, minor), `throttles` by (what, major, minor).

    `what` is "read_bps", "write_bps", "read_iops" or "write_iops"; a rate of 0 means no limit.
    """

    weight: int | None = None
    device_weights: Mapping[tuple[int, int], int] = NOTHING
    throttles: Mapping[tuple[str, int, int], int] = NOTHING


class NetworkLimits(Record):
    """The class of a container's outgoing traffic, and priorities by interface (net_cls and net_prio of cgroup v1)."""

    class_id: int | None = None
    priorities: Mapping[str, int] = NOTHING


class RdmaLimit(Record):
    """Limits on handles and objects of one RDMA device."""

    handles: int | None
    objects: int | None


class Resources(Record):
    """All limits that a configuration can set.  `huge_pages` is bytes by page size ("2MB").

    `unified` is written to the cgroup v2 files it names.
    """

    devices: tuple[DeviceRule, ...] = ()
    memory: MemoryLimits = MemoryLimits()
    cpu: CpuLimits = CpuLimits()
    pids_limit: int | None = None
    block_io: BlockIO = BlockIO()
    huge_pages: Mapping[str, int] = NOTHING
    network: NetworkLimits = NetworkLimits()
    rdma: Mapping[str, RdmaLimit] = NOTHING
    unified: Mapping[str, str] = NOTHING

    @classmethod
    def from_json(cls, value: object, where: str = "linux.resources") -> Resources:
        """Parse `linux.resources`.  Raises SpecError."""
        r = Reader(value, where)
        result = cls(
            devices=_bounded_list(r, "devices", _device_rule),
            memory=r.one("memory", _memory) or MemoryLimits(),
            cpu=r.one("cpu", _cpu) or CpuLimits(),
            pids_limit=r.one("pids", _pids),
            block_io=r.one("blockIO", _block_io) or BlockIO(),
            huge_pages=dict(_bounded_list(r, "hugepageLimits", _huge_pages)),
            network=r.one("network", _network) or NetworkLimits(),
            rdma=r.one("rdma", _rdma) or {},
            unified=dict(r.table("unified")),
        )
        r.done()
        return result

    def updated(self, new: Resources) -> Resources:
        """Return these limits with those given in `new` replaced; the others stay.

        Limits of a device, page size, interface or file are replaced individually, device rules as a whole.
        """
        result: Resources = _merged(self, new)
        return result


#: The keys that identify the entries of a list.
KEYS = ("major", "minor", "pageSize", "name")
#: Limits for which zero is a value: in the document, and as records.
ZEROS = ("cpu.idle", "cpu.burst", "pids.limit")
ZERO_ATTRIBUTES = ("idle", "burst", "pids_limit")


def merge(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Put the limits of one document (linux.resources) over those of another, as `Resources.updated` does."""
    merged = dict(old)
    for name, value in new.items():
        before = merged.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            merged[name] = merge(before, value, f"{name}.")
        elif isinstance(value, list) and isinstance(before, list):
            entries = {tuple(entry.get(key) for key in KEYS): entry for entry in [*before, *value]}
            merged[name] = list(entries.values())
        elif value not in (None, "", 0) or (value == 0 and where + name in ZEROS):
            merged[name] = value
    return merged


def _bounded_list(r: Reader, key: str, parse: Callable[[Any, str], T]) -> tuple[T, ...]:
    """Read a list of at most MAX_ENTRIES entries."""
    found = r.each(key, parse)
    if len(found) > MAX_ENTRIES:
        raise SpecError(r.name(key), f"has {len(found)} entries, and {MAX_ENTRIES} are the most")
    return found


def _merged(old: Any, new: Any) -> Any:
    """Lay `new` over `old`, field by field; a value that is empty, zero or None is not given."""
    changes = {}
    for name, value in vars(new).items():
        before = getattr(old, name)
        if isinstance(value, Record) and isinstance(before, Record):
            changes[name] = _merged(before, value)
        elif isinstance(value, dict):
            changes[name] = {**before, **value}
        elif value or (name in ZERO_ATTRIBUTES and value is not None):
            changes[name] = value
    return old.but(**changes)


def _device_rule(value: object, where: str) -> DeviceRule:
    r = Reader(value, where)
    type_ = r.text("type") or "a"
    if type_ not in ("a", "b", "c"):
        raise SpecError(r.name("type"), f"must be a, b or c, not {type_!r}")
    access = r.text("access") or "rwm"
    if set(access) - set("rwm"):
        raise SpecError(r.name("access"), f"may hold r, w and m only, not {access!r}")
    numbers = [r.number("major", -1, 0xFFF_FFFF), r.number("minor", -1, 0xFFF_FFFF)]
    major, minor = (None if number in (None, -1) else number for number in numbers)
    rule = DeviceRule(r.flag("allow"), type_, major, minor, access)
    r.done()
    if type_ == "a" and (major, minor) != (None, None):
        raise SpecError(where, "a rule for all types cannot name a major or minor number")
    return rule


def _memory(value: object, where: str) -> MemoryLimits:
    r = Reader(value, where)
    r.flag("useHierarchy")  # always on since Linux 5.11: true is satisfied, false looks the same as absent
    swappiness = r.number("swappiness", 0, U64_MAX)
    if swappiness is not None and 100 < swappiness < U64_MAX:
        raise SpecError(r.name("swappiness"), f"must be between 0 and 100, not {swappiness}")
    limits = MemoryLimits(
        limit=r.number("limit", -1, I64_MAX),
        reservation=r.number("reservation", -1, I64_MAX),
        swap=r.number("swap", -1, I64_MAX),
        kernel=r.number("kernel", -1, I64_MAX),
        kernel_tcp=r.number("kernelTCP", -1, I64_MAX),
        swappiness=None if swappiness == U64_MAX else swappiness,  # -1 as some hosts convert it: not given
        disable_oom_killer=r.flag("disableOOMKiller"),
        check_before_update=r.flag("checkBeforeUpdate"),
    )
    r.done()
    return limits


def _cpu(value: object, where: str) -> CpuLimits:
    r = Reader(value, where)
    limits = CpuLimits(
        shares=r.number("shares", 0, U64_MAX),
        quota=r.number("quota", I64_MIN, I64_MAX),
        burst=r.number("burst", 0, U64_MAX),
        period=r.number("period", 0, U64_MAX),
        realtime_runtime=r.number("realtimeRuntime", I64_MIN, I64_MAX),
        realtime_period=r.number("realtimePeriod", 0, U64_MAX),
        idle=r.number("idle", 0, 1),
        cpus=_line(r, "cpus"),
        mems=_line(r, "mems"),
    )
    r.done()
    return limits


def _pids(value: object, where: str) -> int | None:
    r = Reader(value, where)
    limit = r.number("limit", I64_MIN, I64_MAX)
    r.done()
    return limit


def _block_io(value: object, where: str) -> BlockIO:
    r = Reader(value, where)
    r.refuse("leafWeight", LEAF_WEIGHTS)
    throttles: dict[tuple[str, int, int], int] = {}
    for key, what in (
        ("throttleReadBpsDevice", "read_bps"),
        ("throttleWriteBpsDevice", "write_bps"),
        ("throttleReadIOPSDevice", "read_iops"),
        ("throttleWriteIOPSDevice", "write_iops"),
    ):
        throttles |= {
            (what, *device): rate for device, rate in _bounded_list(r, key, _device_value("rate", 0, U64_MAX))
        }
    result = BlockIO(
        weight=_weight(r),
        device_weights=dict(_bounded_list(r, "weightDevice", _device_value("weight", 10, 1000))),
        throttles=throttles,
    )
    r.done()
    return result


def _weight(r: Reader) -> int | None:
    weight = r.number("weight", 0, 1000)
    if weight is not None and 0 < weight < 10:
        raise SpecError(r.name("weight"), f"must be between 10 and 1000, not {weight}")
    return weight


def _device_value(key: str, low: int, high: int) -> Callable[[object, str], tuple[tuple[int, int], int]]:
    """Make a parser of {major, minor, key}."""

    def parse(value: object, where: str) -> tuple[tuple[int, int], int]:
        r = Reader(value, where)
        if key == "weight":
            r.refuse("leafWeight", LEAF_WEIGHTS)
        device = (r.number("major", 0, 0xFFF_FFFF) or 0, r.number("minor", 0, 0xFFF_FFFF) or 0)
        number = r.number(key, low, high)
        r.done()
        if number is None and low:
            raise SpecError(r.name(key), "is missing")
        return device, number or 0

    return parse


def _huge_pages(value: object, where: str) -> tuple[str, int]:
    r = Reader(value, where)
    size, limit = r.text("pageSize"), r.number("limit", 0, U64_MAX) or 0
    r.done()
    number = size[:-2]
    if size[-2:] not in SIZE_UNITS or not (number.isascii() and number.isdecimal()) or number.startswith("0"):
        raise SpecError(r.name("pageSize"), f"{size!r} is not a page size such as 64KB, 2MB or 1GB")
    return size, limit


def _network(value: object, where: str) -> NetworkLimits:
    r = Reader(value, where)
    result = NetworkLimits(r.number("classID", 0, U32_MAX), dict(_bounded_list(r, "priorities", _priority)))
    r.done()
    return result


def _priority(value: object, where: str) -> tuple[str, int]:
    r = Reader(value, where)
    name, priority = r.text("name"), r.number("priority", 0, U32_MAX) or 0
    r.done()
    return _single_word(name, r.name("name"), "the name of an interface"), priority


def _rdma(value: object, where: str) -> dict[str, RdmaLimit]:
    if not isinstance(value, dict):
        raise SpecError(where, f"must be an object, not {type(value).__name__}")
    limits = {}
    for name, item in value.items():
        r = Reader(item, f"{where}.{name}")
        limits[_single_word(str(name), where, "the name of an RDMA device")] = RdmaLimit(
            r.number("hcaHandles", 0, U32_MAX), r.number("hcaObjects", 0, U32_MAX)
        )
        r.done()
    return limits


def _single_word(text: str, where: str, what: str) -> str:
    """Read one word: it must not contain anything that would change the meaning of the line written to the kernel."""
    if not text or text.split() != [text] or "\0" in text:
        raise SpecError(where, f"{text!r} is not {what}")
    return text


def _line(r: Reader, key: str) -> str:
    text = r.text(key)
    if text and text.split() != [text]:
        raise SpecError(r.name(key), f"{text!r} is not a list such as 0-3,7")
    return text

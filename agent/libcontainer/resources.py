"""OCI `linux.resources` as data: what a container may use (runtime-spec 1.2, config-linux.md)."""

from __future__ import annotations

from agent.libcontainer.fields import I64_MAX, I64_MIN, U64_MAX, Reader, SpecError
from agent.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class DeviceRule(Record):
    """One line of the device allow list.  `type` is a, b or c; None numbers mean any; `access` is a subset of "rwm"."""

    allow: bool
    type: str
    major: int | None
    minor: int | None
    access: str


class MemoryLimits(Record):
    """Bytes; -1 is unlimited, None and 0 are not given.  `swap` is memory plus swap, as in cgroup v1."""

    limit: int | None
    reservation: int | None
    swap: int | None
    swappiness: int | None
    disable_oom_killer: bool
    check_before_update: bool


class CpuLimits(Record):
    """`shares` is relative (1024 is the default), `quota` and `period` are microseconds, `cpus`, `mems` lists."""

    shares: int | None
    quota: int | None
    burst: int | None
    period: int | None
    idle: int | None
    cpus: str
    mems: str


class Resources(Record):
    """All limits that can be asked for.  `unified` is written to the cgroup v2 files it names."""

    devices: tuple[DeviceRule, ...] = ()
    memory: MemoryLimits | None = None
    cpu: CpuLimits | None = None
    pids_limit: int | None = None
    unified: Mapping[str, str] | None = None

    @classmethod
    def from_json(cls, value: object, where: str = "linux.resources") -> Resources:
        """Parse `linux.resources`.  Raises SpecError."""
        r = Reader(value, where)
        for key in ("blockIO", "network", "rdma"):
            _refuse_nonzero(r, key)
        r.refuse("hugepageLimits", "huge page limits are not supported yet")
        result = cls(
            devices=r.each("devices", _device_rule),
            memory=r.one("memory", _memory),
            cpu=r.one("cpu", _cpu),
            pids_limit=r.one("pids", _pids),
            unified=dict(r.table("unified")),
        )
        r.done()
        return result


def _refuse_nonzero(r: Reader, key: str) -> None:
    """Refuse an object in which anything is set; hosts send these with every number zero."""
    value = r.raw(key)
    if isinstance(value, dict):
        value = {name: item for name, item in value.items() if item not in (None, 0, "", [], {}, False)}
    if value:
        raise SpecError(r.name(key), "is not supported yet")


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
    for key, what in (("kernel", "kernel memory limits"), ("kernelTCP", "kernel TCP memory limits")):
        if r.raw(key) not in (None, 0, -1):
            raise SpecError(r.name(key), f"{what} do not exist in cgroup v2")
    r.flag("useHierarchy")  # always so in cgroup v2: asking for it is granted, and not asking cannot be told from false
    swappiness = r.number("swappiness", 0, U64_MAX)
    if swappiness not in (None, 0, U64_MAX):
        raise SpecError(r.name("swappiness"), "does not exist in cgroup v2")
    limits = MemoryLimits(
        limit=r.number("limit", -1, I64_MAX),
        reservation=r.number("reservation", -1, I64_MAX),
        swap=r.number("swap", -1, I64_MAX),
        swappiness=None,
        disable_oom_killer=r.flag("disableOOMKiller"),
        check_before_update=r.flag("checkBeforeUpdate"),
    )
    if limits.disable_oom_killer:
        raise SpecError(r.name("disableOOMKiller"), "does not exist in cgroup v2")
    if limits.check_before_update:
        raise SpecError(r.name("checkBeforeUpdate"), "is not supported yet")
    r.done()
    return limits


def _cpu(value: object, where: str) -> CpuLimits:
    r = Reader(value, where)
    for key in ("realtimeRuntime", "realtimePeriod"):
        if r.raw(key) not in (None, 0):
            raise SpecError(r.name(key), "does not exist in cgroup v2")
    limits = CpuLimits(
        shares=r.number("shares", 0, U64_MAX),
        quota=r.number("quota", I64_MIN, I64_MAX),
        burst=r.number("burst", 0, U64_MAX),
        period=r.number("period", 0, U64_MAX),
        idle=r.number("idle", 0, 1),
        cpus=r.text("cpus"),
        mems=r.text("mems"),
    )
    r.done()
    return limits


def _pids(value: object, where: str) -> int | None:
    r = Reader(value, where)
    limit = r.number("limit", I64_MIN, I64_MAX)
    r.done()
    return limit

"""Limits of a configuration as files of cgroup v2.  https://docs.kernel.org/admin-guide/cgroup-v2.html"""

from __future__ import annotations

from caisson.agent.libcontainer.cgroups.base import WHERE, Setting
from caisson.agent.libcontainer.config.reader import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from caisson.agent.libcontainer.config.resources import BlockIO, CpuLimits, MemoryLimits, Resources

DEFAULT_PERIOD = 100_000  # microseconds, the kernel's
NOT_IN_V2 = "does not exist in cgroup v2"

#: What v2 does not have: (record, its attribute, the field, why)
REFUSED = (
    ("memory", "kernel", "memory.kernel", f"kernel memory limits {NOT_IN_V2.replace('does', 'do')}"),
    ("memory", "kernel_tcp", "memory.kernelTCP", f"kernel TCP memory limits {NOT_IN_V2.replace('does', 'do')}"),
    ("memory", "swappiness", "memory.swappiness", NOT_IN_V2),
    ("memory", "disable_oom_killer", "memory.disableOOMKiller", NOT_IN_V2),
    ("cpu", "realtime_runtime", "cpu.realtimeRuntime", NOT_IN_V2),
    ("cpu", "realtime_period", "cpu.realtimePeriod", NOT_IN_V2),
    ("network", "class_id", "network.classID", "network classes do not exist in cgroup v2"),
    ("network", "priorities", "network.priorities", "network priorities do not exist in cgroup v2"),
)

THROTTLES = {
    "read_bps": ("throttleReadBpsDevice", "rbps"),
    "write_bps": ("throttleWriteBpsDevice", "wbps"),
    "read_iops": ("throttleReadIOPSDevice", "riops"),
    "write_iops": ("throttleWriteIOPSDevice", "wiops"),
}


def settings(resources: Resources, now: Callable[[str], str | None] = lambda file: None) -> Iterator[Setting]:
    """Yield the limits in an order that the kernel accepts; `now` returns a file's current value.

    Raises SpecError for what v2 does not support.
    """
    for record, attribute, field, why in REFUSED:
        value = getattr(getattr(resources, record), attribute)
        if value and value != -1:  # -1 is no limit, and that there is
            raise SpecError(f"{WHERE}.{field}", why)
    yield from _memory(resources.memory, f"{WHERE}.memory")
    yield from _cpu(resources.cpu, f"{WHERE}.cpu", now)
    if resources.pids_limit is not None:
        yield Setting(f"{WHERE}.pids.limit", "pids.max", pids_max(resources.pids_limit))
    yield from _block_io(resources.block_io, f"{WHERE}.blockIO")
    for size, bytes_ in resources.huge_pages.items():
        field = f"{WHERE}.hugepageLimits"
        yield Setting(field, f"hugetlb.{size}.max", str(bytes_))
        yield Setting(field, f"hugetlb.{size}.rsvd.max", str(bytes_), optional=True)
    yield from rdma(resources)
    for file, value in resources.unified.items():
        if "/" in file or "." not in file.strip(".") or file.startswith("cgroup."):
            raise SpecError(f"{WHERE}.unified", f"{file!r} is not a limit")
        for line in value.splitlines():
            yield Setting(f"{WHERE}.unified[{file}]", file, line)


def memory_and_swap(memory: MemoryLimits) -> int | None:
    """Return the limit of swap alone, -1 for none; None where memory.swap is not given.  Raises SpecError."""
    if not memory.swap:
        return None
    if memory.swap < 0:
        return -1
    if not memory.limit or memory.limit < 0 or memory.swap < memory.limit:
        raise SpecError(f"{WHERE}.memory.swap", "is memory plus swap, and needs a limit that is not above it")
    return memory.swap - memory.limit


def _memory(memory: MemoryLimits, where: str) -> Iterator[Setting]:
    swap = memory_and_swap(memory)
    if swap is not None:
        # A kernel without swap accounting has no swap, or no limit on it: there, only -1 is satisfied.
        yield Setting(f"{where}.swap", "memory.swap.max", _or_max(swap), optional=swap < 0)
    if memory.limit:
        yield Setting(f"{where}.limit", "memory.max", _or_max(memory.limit))
    if memory.reservation:
        yield Setting(f"{where}.reservation", "memory.low", _or_max(memory.reservation))


def _cpu(cpu: CpuLimits, where: str, now: Callable[[str], str | None]) -> Iterator[Setting]:
    if cpu.idle is not None:
        yield Setting(f"{where}.idle", "cpu.idle", str(cpu.idle), optional=not cpu.idle)
    if cpu.shares and not cpu.idle:  # an idle group has no weight
        yield Setting(f"{where}.shares", "cpu.weight", str(weight(cpu.shares)))
    bandwidth = []
    if cpu.quota or cpu.period:
        quota = str(cpu.quota) if cpu.quota and cpu.quota > 0 else "max"
        field = "quota" if cpu.quota else "period"
        bandwidth.append(Setting(f"{where}.{field}", "cpu.max", f"{quota} {cpu.period or DEFAULT_PERIOD}"))
    if cpu.burst is not None:
        burst = Setting(f"{where}.burst", "cpu.max.burst", str(cpu.burst), optional=not cpu.burst)
        # It may never exceed the quota: lower it first, raise it last.
        bandwidth.insert(0 if cpu.burst < int(now("cpu.max.burst") or 0) else len(bandwidth), burst)
    yield from bandwidth
    if cpu.cpus:
        yield Setting(f"{where}.cpus", "cpuset.cpus", cpu.cpus)
    if cpu.mems:
        yield Setting(f"{where}.mems", "cpuset.mems", cpu.mems)


def _block_io(block: BlockIO, where: str) -> Iterator[Setting]:
    if block.weight:
        general = f"default {io_weight(block.weight)}"
        yield Setting(f"{where}.weight", "io.bfq.weight", f"default {block.weight}", (("io.weight", general),))
    for (major, minor), number in block.device_weights.items():
        device = f"{major}:{minor}"
        general = f"{device} {io_weight(number)}"
        yield Setting(f"{where}.weightDevice", "io.bfq.weight", f"{device} {number}", (("io.weight", general),))
    for (what, major, minor), rate in block.throttles.items():
        field, key = THROTTLES[what]
        yield Setting(f"{where}.{field}", "io.max", f"{major}:{minor} {key}={rate or 'max'}")


def rdma(resources: Resources) -> Iterator[Setting]:
    """Format limits of RDMA devices, the same in both versions."""
    for name, limit in resources.rdma.items():
        numbers = {"hca_handle": limit.handles, "hca_object": limit.objects}
        words = [f"{key}={number}" for key, number in numbers.items() if number is not None]
        if words:
            yield Setting(f"{WHERE}.rdma.{name}", "rdma.max", " ".join([name, *words]))


def pids_max(limit: int) -> str:
    """Format a process limit; there is always at least one process, so 0 means 1, as with runc."""
    return "max" if limit < 0 else str(limit or 1)


def _or_max(number: int) -> str:
    return "max" if number < 0 else str(number)


def weight(shares: int) -> int:
    """Convert shares of cgroup v1 (2-262144, by default 1024) to a weight of v2 (1-10000, by default 100), as runc does
    since 1.3.
    """
    from math import log2

    if shares <= 2:
        return 1
    if shares >= 262144:
        return 10000
    scale = log2(shares)
    return round(10 ** ((scale * scale + 125 * scale) / 612 - 7 / 34))


def io_weight(number: int) -> int:
    """Convert a weight of block I/O (10-1000) to one of io.weight (1-10000)."""
    return 1 + (number - 10) * 9999 // 990

"""Resource usage of a v2 cgroup.  https://docs.kernel.org/admin-guide/cgroup-v2.html"""

from __future__ import annotations

from caisson.agent.libcontainer.cgroups.stats import (
    UNLIMITED,
    BlkioEntry,
    BlkioStats,
    CgroupDirectory,
    CgroupStats,
    CpuStats,
    CpuUsage,
    HugetlbStats,
    MemoryData,
    MemoryStats,
    ThrottlingData,
    device,
    pids,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

OPERATIONS = {
    "rbytes": ("io_service_bytes_recursive", "Read"),
    "wbytes": ("io_service_bytes_recursive", "Write"),
    "dbytes": ("io_service_bytes_recursive", "Discard"),
    "rios": ("io_serviced_recursive", "Read"),
    "wios": ("io_serviced_recursive", "Write"),
    "dios": ("io_serviced_recursive", "Discard"),
}


def read(path: str, count: Callable[[], int]) -> CgroupStats:
    """Read all counters of the cgroup `path`; `count` counts processes where the kernel does not."""
    files = CgroupDirectory(path)
    return CgroupStats(_cpu(files), _memory(files), pids(files, count), _io(files), _hugetlb(files))


def _cpu(files: CgroupDirectory) -> CpuStats:
    stat = files.table("cpu.stat")
    usage = CpuUsage(
        total_usage=stat.get("usage_usec", 0) * 1000,
        usage_in_kernelmode=stat.get("system_usec", 0) * 1000,
        usage_in_usermode=stat.get("user_usec", 0) * 1000,
    )
    throttled = ThrottlingData(
        stat.get("nr_periods", 0), stat.get("nr_throttled", 0), stat.get("throttled_usec", 0) * 1000
    )
    return CpuStats(usage, throttled)


def _memory(files: CgroupDirectory) -> MemoryStats:
    current, limit = files.number("memory.current"), files.number("memory.max")
    stats = files.table("memory.stat")
    if not stats:
        return MemoryStats()
    usage = MemoryData(current, files.number("memory.peak"), files.table("memory.events").get("max", 0), limit)
    swap_limit = files.number("memory.swap.max")
    with_swap = MemoryData(
        usage=current + files.number("memory.swap.current"),
        failcnt=files.table("memory.swap.events").get("max", 0),
        limit=UNLIMITED if UNLIMITED in (limit, swap_limit) else limit + swap_limit,
    )
    kernel = MemoryData(usage=stats.get("kernel", 0), limit=UNLIMITED)
    return MemoryStats(stats.get("file", 0), usage, with_swap, kernel, use_hierarchy=True, stats=stats)


def _io(files: CgroupDirectory) -> BlkioStats:
    found: dict[str, list[BlkioEntry]] = {name: [] for name, _ in OPERATIONS.values()}
    for line in files.text("io.stat").splitlines():
        key, _, counters = line.partition(" ")
        disk = device(key)
        for counter in counters.split():
            name, _, value = counter.partition("=")
            if disk is not None and name in OPERATIONS and value.isdecimal():
                kind, op = OPERATIONS[name]
                found[kind].append(BlkioEntry(*disk, op, int(value)))
    return BlkioStats(**{name: tuple(entries) for name, entries in found.items()})


def _hugetlb(files: CgroupDirectory) -> dict[str, HugetlbStats]:
    return {
        size: HugetlbStats(
            usage=files.number(f"hugetlb.{size}.current"),
            failcnt=files.table(f"hugetlb.{size}.events").get("max", 0),
        )
        for size in files.page_sizes("current")
    }

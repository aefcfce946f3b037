"""Resource usage of a v1 cgroup.  https://docs.kernel.org/admin-guide/cgroup-v1/index.html"""

from __future__ import annotations

import os

from caisson.agent.libcontainer.cgroups.stats import (
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
    from collections.abc import Callable, Mapping

#: Fields and their files, in the order in which schedulers count them.
BLKIO = {
    "io_service_bytes_recursive": "io_service_bytes",
    "io_serviced_recursive": "io_serviced",
    "io_queued_recursive": "io_queued",
    "io_service_time_recursive": "io_service_time",
    "io_wait_time_recursive": "io_wait_time",
    "io_merged_recursive": "io_merged",
    "io_time_recursive": "time",
    "sectors_recursive": "sectors",
}
FAMILIES = ("blkio.bfq.{}_recursive", "blkio.{}_recursive", "blkio.throttle.{}_recursive", "blkio.throttle.{}")


def read(directories: Mapping[str, str], count: Callable[[], int]) -> CgroupStats:
    """Read all counters by the `directories` of controllers; `count` counts processes where the kernel does not."""

    def of(controller: str) -> CgroupDirectory:
        return CgroupDirectory(directories.get(controller))

    return CgroupStats(
        _cpu(of("cpuacct"), of("cpu")),
        _memory(of("memory")),
        pids(of("pids"), count),
        _blkio(of("blkio")),
        _hugetlb(of("hugetlb")),
    )


def _cpu(account: CgroupDirectory, cpu: CgroupDirectory) -> CpuStats:
    ticks = account.table("cpuacct.stat")
    tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    usage = CpuUsage(
        total_usage=account.number("cpuacct.usage"),
        percpu_usage=tuple(map(int, account.text("cpuacct.usage_percpu").split())),
        usage_in_kernelmode=account.number("cpuacct.usage_sys") or ticks.get("system", 0) * tick,
        usage_in_usermode=account.number("cpuacct.usage_user") or ticks.get("user", 0) * tick,
    )
    stat = cpu.table("cpu.stat")
    throttled = ThrottlingData(stat.get("nr_periods", 0), stat.get("nr_throttled", 0), stat.get("throttled_time", 0))
    return CpuStats(usage, throttled)


def _memory(files: CgroupDirectory) -> MemoryStats:
    def data(what: str) -> MemoryData:
        names = ("usage_in_bytes", "max_usage_in_bytes", "failcnt", "limit_in_bytes")
        return MemoryData(*(files.number(f"memory.{what}{name}") for name in names))

    stats = files.table("memory.stat")
    return MemoryStats(
        cache=stats.get("cache", 0),
        usage=data(""),
        swap_usage=data("memsw."),
        kernel_usage=data("kmem."),
        use_hierarchy=files.number("memory.use_hierarchy") == 1,
        stats=stats,
    )


def _blkio(files: CgroupDirectory) -> BlkioStats:
    return BlkioStats(**{field: _entries(files, name) for field, name in BLKIO.items()})


def _entries(files: CgroupDirectory, name: str) -> tuple[BlkioEntry, ...]:
    """Read lines "8:0 Read 5" or "8:0 5" of the first file that has any; totals over all devices have no entry."""
    for family in FAMILIES:
        found = []
        for line in files.text(family.format(name)).splitlines():
            disk, *op, value = line.split() or ["", ""]
            numbers = device(disk)
            if numbers is not None and value.isdecimal():
                found.append(BlkioEntry(*numbers, " ".join(op), int(value)))
        if found:
            return tuple(found)
    return ()


def _hugetlb(files: CgroupDirectory) -> dict[str, HugetlbStats]:
    return {
        size: HugetlbStats(
            *(files.number(f"hugetlb.{size}.{name}") for name in ("usage_in_bytes", "max_usage_in_bytes", "failcnt"))
        )
        for size in files.page_sizes("usage_in_bytes")
    }

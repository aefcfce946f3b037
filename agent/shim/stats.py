"""Convert the agent's counters of a container to containerd's metrics (io.containerd.cgroups.v2.Metrics)."""

from __future__ import annotations

from typing import Any

from caisson.proto.containerd import metrics_pb2

#: No limit.
UNLIMITED = (1 << 64) - 1

#: Counters of memory.stat with the same name in the metrics.
MEMORY = tuple(
    field.name
    for field in metrics_pb2.MemoryStat.DESCRIPTOR.fields
    if field.name not in ("usage", "usage_limit", "swap_usage", "swap_limit", "max_usage", "swap_max_usage")
)


def metrics(stats: Any) -> metrics_pb2.Metrics:
    """Return the metrics of a StatsContainerResponse."""
    cgroup = stats.cgroup_stats
    made = metrics_pb2.Metrics()
    made.pids.current, made.pids.limit = cgroup.pids_stats.current, cgroup.pids_stats.limit
    usage, throttling = cgroup.cpu_stats.cpu_usage, cgroup.cpu_stats.throttling_data
    made.cpu.usage_usec = usage.total_usage // 1000
    made.cpu.user_usec = usage.usage_in_usermode // 1000
    made.cpu.system_usec = usage.usage_in_kernelmode // 1000
    made.cpu.nr_periods, made.cpu.nr_throttled = throttling.periods, throttling.throttled_periods
    made.cpu.throttled_usec = throttling.throttled_time // 1000
    memory = cgroup.memory_stats
    for name in MEMORY:
        setattr(made.memory, name, memory.stats.get(name, 0))
    made.memory.usage, made.memory.usage_limit = memory.usage.usage, memory.usage.limit
    made.memory.max_usage = memory.usage.max_usage
    both = memory.swap_usage  # with memory, in the agent's API; without it in containerd's
    made.memory.swap_usage = max(0, both.usage - memory.usage.usage)
    made.memory.swap_limit = both.limit if both.limit == UNLIMITED else max(0, both.limit - memory.usage.limit)
    made.memory_events.max = memory.usage.failcnt
    made.io.SetInParent()  # clients expect it even without entries
    _add_io(made, cgroup.blkio_stats)
    for page_size, huge in cgroup.hugetlb_stats.items():
        made.hugetlb.add(current=huge.usage, max=huge.max_usage, pagesize=page_size)
    for one in stats.network_stats:
        if one.name != "lo":
            fields = {field.name: getattr(one, field.name) for field in one.DESCRIPTOR.fields}
            made.network.add(**fields)
    return made


def _add_io(made: metrics_pb2.Metrics, blkio: Any) -> None:
    entries: dict[tuple[int, int], metrics_pb2.IOEntry] = {}
    kinds = ((blkio.io_service_bytes_recursive, "bytes"), (blkio.io_serviced_recursive, "ios"))
    for recorded, kind in kinds:
        for one in recorded:
            if one.op.lower() not in ("read", "write"):
                continue
            key = one.major, one.minor
            if key not in entries:
                entries[key] = made.io.usage.add(major=one.major, minor=one.minor)
            setattr(entries[key], f"{one.op[0].lower()}{kind}", one.value)

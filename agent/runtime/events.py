"""`events`: a container's periodic statistics and out-of-memory events, as JSON lines (types/events.go)."""

from __future__ import annotations

import sys

from caisson.agent.base.json import dumps
from caisson.agent.libcontainer.state import STOPPED
from caisson.agent.libcontainer.waits import complete
from caisson.agent.runtime.errors import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from caisson.agent.libcontainer.cgroups import Cgroup
    from caisson.agent.libcontainer.cgroups.stats import BlkioEntry, CgroupStats, MemoryData
    from caisson.agent.runtime.main import Call

#: Units of a Go duration, in seconds.
UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
CPUSET = (
    "cpu_exclusive", "mem_hardwall", "mem_exclusive", "memory_migrate", "memory_spread_page", "memory_spread_slab",
    "memory_pressure", "sched_load_balance", "sched_relax_domain_level",
)  # fmt: skip


def events(call: Call) -> int:
    """Print events until the container exits, or its statistics once."""
    interval = duration(call.options.text("interval"))
    if interval <= 0:
        raise CommandError("duration interval must be greater than 0")
    container = call.container()
    cgroup = container.cgroup
    if container.status == STOPPED or cgroup is None:
        raise CommandError(f"container with id {container.id} is not running")
    if call.options.flag("stats"):
        _print("stats", container.id, data(cgroup))
        return 0
    _follow(call, container.id, cgroup, interval)
    return 0


def _follow(call: Call, name: str, cgroup: Cgroup, interval: float) -> None:
    """Print statistics at every interval and each out-of-memory event, until the cgroup is gone."""
    from caisson.agent.libcontainer.waits import Deadline

    watch = cgroup.oom_watch(lambda: _print("oom", name, None))
    waits = call.runtime.waits
    deadline = Deadline(interval)
    try:
        while cgroup.exists:
            if watch is None or watch.fileno() < 0:
                complete(waits.sleep(deadline.left or 0))
            else:
                delay = deadline.left if watch.delay is None else min(watch.delay, deadline.left or 0)
                if complete(waits.readable(watch.fileno(), seconds=delay)):
                    watch.on_readable()
                elif watch.delay is not None:
                    watch.on_timeout()
            if not deadline.left and cgroup.exists:
                _print("stats", name, data(cgroup))
                deadline = Deadline(interval)
    finally:
        if watch is not None:
            watch.close()


def _print(kind: str, name: str, about: dict[str, Any] | None) -> None:
    event: dict[str, Any] = {"type": kind, "id": name}
    sys.stdout.write(dumps(event if about is None else event | {"data": about}) + "\n")
    sys.stdout.flush()


def duration(text: str) -> float:
    """Parse a Go duration such as 1m30s or 500ms into seconds.  Raises CommandError."""
    import re  # late: no other command needs it

    part = r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)"
    if not re.fullmatch(rf"[+-]?(0|({part})+)", text, re.ASCII):
        raise CommandError(f'invalid value "{text}" for flag -interval: parse error')
    seconds = sum(float(number) * UNITS[unit] for number, unit in re.findall(part, text))
    return -seconds if text.startswith("-") else seconds


def data(cgroup: Cgroup) -> dict[str, Any]:
    """Return the statistics of a cgroup, under the names that callers expect."""
    stats = cgroup.stats()
    return {
        "cpu": _cpu(stats, cgroup),
        "cpuset": _cpuset(cgroup),
        "memory": _memory(stats, cgroup),
        "pids": _without_zeros({"current": stats.pids_stats.current, "limit": stats.pids_stats.limit}),
        "blkio": _block_io(stats),
        "hugetlb": {
            size: {"usage": one.usage, "max": one.max_usage, "failcnt": one.failcnt}
            for size, one in stats.hugetlb_stats.items()
        },
        "intel_rdt": {},
        "network_interfaces": None,
    }


def _without_zeros(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value}


def _cpu(stats: CgroupStats, cgroup: Cgroup) -> dict[str, Any]:
    usage, throttling = stats.cpu_stats.cpu_usage, stats.cpu_stats.throttling_data
    rows = [line.split() for line in (cgroup.read("cpuacct.usage_all") or "").splitlines()[1:]]
    found: dict[str, Any] = {
        "usage": _without_zeros(
            {
                "total": usage.total_usage,
                "percpu": list(usage.percpu_usage),
                "percpu_kernel": [int(row[2]) for row in rows if len(row) == 3],
                "percpu_user": [int(row[1]) for row in rows if len(row) == 3],
            }
        )
        | {"kernel": usage.usage_in_kernelmode, "user": usage.usage_in_usermode},
        "throttling": _without_zeros(
            {
                "periods": throttling.periods,
                "throttledPeriods": throttling.throttled_periods,
                "throttledTime": throttling.throttled_time,
            }
        ),
    }
    if not found["throttling"]:
        del found["throttling"]
    return found | _pressure(cgroup, "cpu")


def _pressure(cgroup: Cgroup, what: str) -> dict[str, Any]:
    """Read pressure stall information (accounting/psi.rst), if the kernel has it."""
    text = cgroup.read(f"{what}.pressure")
    if not text:
        return {}
    found: dict[str, Any] = {}
    for line in text.splitlines():
        kind, *words = line.split()
        values = dict(word.partition("=")[::2] for word in words)
        found[kind] = {key: float(value) if key.startswith("avg") else int(value) for key, value in values.items()}
    return {"psi": found}


def _numbers(text: str) -> list[int]:
    from caisson.agent.libcontainer.cgroups.cpuset import numbers

    return sorted(numbers(text.strip()) or ()) if text.strip() else []


def _cpuset(cgroup: Cgroup) -> dict[str, Any]:
    cpus = _numbers(cgroup.read("cpuset.cpus") or cgroup.read("cpuset.cpus.effective") or "")
    mems = _numbers(cgroup.read("cpuset.mems") or "")
    texts = {key: (cgroup.read(f"cpuset.{key}") or "0").strip() for key in CPUSET}
    flags = {key: int(text) if text.lstrip("-").isdecimal() else 0 for key, text in texts.items()}
    order = ("cpus", "cpu_exclusive", "mems")
    found: dict[str, Any] = {"cpus": cpus, "mems": mems, **flags}
    return {key: found[key] for key in (*order, *flags) if found[key] != []}


def _memory(stats: CgroupStats, cgroup: Cgroup) -> dict[str, Any]:
    memory = stats.memory_stats
    tcp = {
        name: int(text) if (text := (cgroup.read(f"memory.kmem.tcp.{file}") or "0").strip()).isdecimal() else 0
        for name, file in (("limit", "limit_in_bytes"), ("usage", "usage_in_bytes"), ("max", "max_usage_in_bytes"))
    }
    return (
        _without_zeros({"cache": memory.cache})
        | {
            "usage": _entry(memory.usage),
            "swap": _entry(memory.swap_usage),
            "kernel": _entry(memory.kernel_usage),
            "kernelTCP": _without_zeros({"limit": tcp["limit"]}) | {"failcnt": 0},
            "raw": dict(sorted(memory.stats.items())),
        }
        | _pressure(cgroup, "memory")
    )


def _entry(usage: MemoryData) -> dict[str, Any]:
    return (
        {"limit": usage.limit}
        | _without_zeros({"usage": usage.usage, "max": usage.max_usage})
        | {"failcnt": usage.failcnt}
    )


def _block_io(stats: CgroupStats) -> dict[str, Any]:
    block = stats.blkio_stats
    rows = {
        "ioServiceBytesRecursive": block.io_service_bytes_recursive,
        "ioServicedRecursive": block.io_serviced_recursive,
        "ioQueueRecursive": block.io_queued_recursive,
        "ioServiceTimeRecursive": block.io_service_time_recursive,
        "ioWaitTimeRecursive": block.io_wait_time_recursive,
        "ioMergedRecursive": block.io_merged_recursive,
        "ioTimeRecursive": block.io_time_recursive,
        "sectorsRecursive": block.sectors_recursive,
    }
    return {name: [_block_entry(entry) for entry in entries] for name, entries in rows.items() if entries}


def _block_entry(entry: BlkioEntry) -> dict[str, Any]:
    return {"major": entry.major, "minor": entry.minor, "op": entry.op, "value": entry.value}

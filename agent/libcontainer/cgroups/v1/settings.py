"""Limits of a configuration as files of cgroup v1.  https://docs.kernel.org/admin-guide/cgroup-v1/index.html"""

from __future__ import annotations

from caisson.agent.libcontainer.cgroups.base import WHERE, Setting
from caisson.agent.libcontainer.cgroups.v2.settings import THROTTLES, memory_and_swap, pids_max, rdma
from caisson.agent.libcontainer.config.reader import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from caisson.agent.libcontainer.config.resources import BlockIO, CpuLimits, MemoryLimits, NetworkLimits, Resources

NO_LIMIT = 1 << 63
SHARES = (2, 262144)


def settings(resources: Resources, now: Callable[[str], str | None] = lambda file: None) -> Iterator[Setting]:
    """Yield the limits in an order that the kernel accepts; `now` returns a file's current value.

    Raises SpecError for what v1 does not support.
    """
    if resources.unified:
        raise SpecError(f"{WHERE}.unified", "is for cgroup v2, and this machine has v1")
    yield from _memory(resources.memory, f"{WHERE}.memory", now)
    yield from _cpu(resources.cpu, f"{WHERE}.cpu", now)
    if resources.pids_limit is not None:
        yield Setting(f"{WHERE}.pids.limit", "pids.max", pids_max(resources.pids_limit))
    yield from _block_io(resources.block_io, f"{WHERE}.blockIO")
    for size, bytes_ in resources.huge_pages.items():
        field = f"{WHERE}.hugepageLimits"
        yield Setting(field, f"hugetlb.{size}.limit_in_bytes", str(bytes_))
        yield Setting(field, f"hugetlb.{size}.rsvd.limit_in_bytes", str(bytes_), optional=True)
    yield from _network(resources.network, f"{WHERE}.network")
    yield from rdma(resources)


def _memory(memory: MemoryLimits, where: str, now: Callable[[str], str | None]) -> Iterator[Setting]:
    memory_and_swap(memory)  # check that they are consistent
    limit, swap = memory.limit, memory.swap
    if limit and limit < 0 and not swap:
        swap = -1  # memory and swap together cannot have a limit when memory has none
    pair = []
    if limit:
        pair.append(Setting(f"{where}.limit", "memory.limit_in_bytes", str(limit)))
    if swap:
        setting = Setting(f"{where}.swap", "memory.memsw.limit_in_bytes", str(swap), optional=swap < 0)
        # The sum may never be the smaller one: raise it first, lower it last.
        grows = _bytes(limit) > int(now("memory.memsw.limit_in_bytes") or NO_LIMIT)
        pair.insert(0 if grows else len(pair), setting)
    yield from pair
    if memory.reservation:
        yield Setting(f"{where}.reservation", "memory.soft_limit_in_bytes", str(memory.reservation))
    for field, file, number in (
        ("kernel", "memory.kmem.limit_in_bytes", memory.kernel),
        ("kernelTCP", "memory.kmem.tcp.limit_in_bytes", memory.kernel_tcp),
    ):
        if number:
            yield Setting(f"{where}.{field}", file, str(number), optional=number < 0, unreliable=number > 0)
    if memory.swappiness:
        yield Setting(f"{where}.swappiness", "memory.swappiness", str(memory.swappiness))
    if memory.disable_oom_killer:
        yield Setting(f"{where}.disableOOMKiller", "memory.oom_control", "1")


def _bytes(limit: int | None) -> int:
    """Return a limit as a number to compare; 0 if it is not given."""
    return NO_LIMIT if limit is not None and limit < 0 else limit or 0


def _cpu(cpu: CpuLimits, where: str, now: Callable[[str], str | None]) -> Iterator[Setting]:
    if cpu.idle is not None:
        yield Setting(f"{where}.idle", "cpu.idle", str(cpu.idle), optional=not cpu.idle)
    if cpu.shares and not cpu.idle:  # an idle group has no weight
        yield Setting(f"{where}.shares", "cpu.shares", str(min(max(cpu.shares, SHARES[0]), SHARES[1])))
    yield from _bandwidth(cpu, where, now)
    yield from _realtime(cpu, where, now)
    if cpu.cpus:
        yield Setting(f"{where}.cpus", "cpuset.cpus", cpu.cpus)
    if cpu.mems:
        yield Setting(f"{where}.mems", "cpuset.mems", cpu.mems)


def _bandwidth(cpu: CpuLimits, where: str, now: Callable[[str], str | None]) -> Iterator[Setting]:
    found = []
    if cpu.period:
        found.append(Setting(f"{where}.period", "cpu.cfs_period_us", str(cpu.period)))
    if cpu.quota:
        setting = Setting(f"{where}.quota", "cpu.cfs_quota_us", str(max(cpu.quota, -1)))
        old_quota, old_period = (int(now(f"cpu.cfs_{name}_us") or -1) for name in ("quota", "period"))
        new_quota, new_period = max(cpu.quota, -1), cpu.period or old_period
        # One of the two comes first; in between, the ratio must not exceed the parent's: take the smaller one.
        quota_first = old_quota > 0 and new_quota > 0 and new_quota * new_period < old_quota * old_period
        found.insert(0 if quota_first else len(found), setting)
    if cpu.burst is not None:
        setting = Setting(f"{where}.burst", "cpu.cfs_burst_us", str(cpu.burst), optional=not cpu.burst)
        found.insert(0 if cpu.burst < int(now("cpu.cfs_burst_us") or 0) else len(found), setting)
    yield from found


def _realtime(cpu: CpuLimits, where: str, now: Callable[[str], str | None]) -> Iterator[Setting]:
    found = []
    if cpu.realtime_runtime:
        found.append(Setting(f"{where}.realtimeRuntime", "cpu.rt_runtime_us", str(cpu.realtime_runtime)))
    if cpu.realtime_period:
        setting = Setting(f"{where}.realtimePeriod", "cpu.rt_period_us", str(cpu.realtime_period))
        # The runtime may never be above the period.
        found.insert(0 if cpu.realtime_period > int(now("cpu.rt_period_us") or 0) else len(found), setting)
    yield from found


def _block_io(block: BlockIO, where: str) -> Iterator[Setting]:
    if block.weight:
        number = str(block.weight)
        yield Setting(f"{where}.weight", "blkio.bfq.weight", number, (("blkio.weight", number),))
    for (major, minor), weight in block.device_weights.items():
        value = f"{major}:{minor} {weight}"
        yield Setting(f"{where}.weightDevice", "blkio.bfq.weight_device", value, (("blkio.weight_device", value),))
    for (what, major, minor), rate in block.throttles.items():
        yield Setting(f"{where}.{THROTTLES[what][0]}", f"blkio.throttle.{what}_device", f"{major}:{minor} {rate}")


def _network(network: NetworkLimits, where: str) -> Iterator[Setting]:
    if network.class_id:
        yield Setting(f"{where}.classID", "net_cls.classid", str(network.class_id))
    for name, priority in network.priorities.items():
        yield Setting(f"{where}.priorities", "net_prio.ifpriomap", f"{name} {priority}")

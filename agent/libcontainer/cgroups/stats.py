"""Resource usage of a container, as records whose fields are named as on the wire (proto/kata1/agent.proto).

A missing file (an unavailable controller, a removed container) counts as zeros.
"""

from __future__ import annotations

from caisson.agent.libcontainer.cgroups import files
from caisson.proto.record import NOTHING, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: "No limit", where the kernel says "max".
UNLIMITED = (1 << 64) - 1


class CpuUsage(Record):
    """Nanoseconds; `percpu_usage` by CPU number, where the kernel counts by CPU."""

    total_usage: int = 0
    percpu_usage: tuple[int, ...] = ()
    usage_in_kernelmode: int = 0
    usage_in_usermode: int = 0


class ThrottlingData(Record):
    """Periods with a quota, periods in which it was exhausted, and nanoseconds throttled."""

    periods: int = 0
    throttled_periods: int = 0
    throttled_time: int = 0


class CpuStats(Record):
    cpu_usage: CpuUsage = CpuUsage()
    throttling_data: ThrottlingData = ThrottlingData()


class MemoryData(Record):
    """Bytes; `failcnt` is how often the limit was hit."""

    usage: int = 0
    max_usage: int = 0
    failcnt: int = 0
    limit: int = 0


class MemoryStats(Record):
    """Bytes.  `swap_usage` is memory plus swap; `stats` is memory.stat, whose keys differ between the versions."""

    cache: int = 0
    usage: MemoryData = MemoryData()
    swap_usage: MemoryData = MemoryData()
    kernel_usage: MemoryData = MemoryData()
    use_hierarchy: bool = False
    stats: Mapping[str, int] = NOTHING


class PidsStats(Record):
    """A limit of 0 means none."""

    current: int = 0
    limit: int = 0


class BlkioEntry(Record):
    """One counter of one device; `op` is Read, Write, … or empty if not counted by operation."""

    major: int
    minor: int
    op: str
    value: int


class BlkioStats(Record):
    """Bytes, operations, nanoseconds of the devices; cgroup v2 has the first two."""

    io_service_bytes_recursive: tuple[BlkioEntry, ...] = ()
    io_serviced_recursive: tuple[BlkioEntry, ...] = ()
    io_queued_recursive: tuple[BlkioEntry, ...] = ()
    io_service_time_recursive: tuple[BlkioEntry, ...] = ()
    io_wait_time_recursive: tuple[BlkioEntry, ...] = ()
    io_merged_recursive: tuple[BlkioEntry, ...] = ()
    io_time_recursive: tuple[BlkioEntry, ...] = ()
    sectors_recursive: tuple[BlkioEntry, ...] = ()


class HugetlbStats(Record):
    """Bytes of one page size."""

    usage: int = 0
    max_usage: int = 0
    failcnt: int = 0


class CgroupStats(Record):
    cpu_stats: CpuStats = CpuStats()
    memory_stats: MemoryStats = MemoryStats()
    pids_stats: PidsStats = PidsStats()
    blkio_stats: BlkioStats = BlkioStats()
    hugetlb_stats: Mapping[str, HugetlbStats] = NOTHING


class CgroupDirectory:
    """Files of one cgroup directory; missing ones are not an error, nor is a missing directory (None)."""

    def __init__(self, path: str | None) -> None:
        self._path = path

    def text(self, name: str) -> str:
        """Read a file; "" if it is missing."""
        if self._path is None:
            return ""
        try:
            return files.read(f"{self._path}/{name}")
        except OSError:
            return ""

    def number(self, name: str) -> int:
        """Read a single number: UNLIMITED for "max", 0 if the file is missing."""
        return _number(self.text(name).strip())

    def table(self, name: str) -> dict[str, int]:
        """Read lines of a key and a number."""
        rows = (line.split() for line in self.text(name).splitlines())
        return {row[0]: _number(row[1]) for row in rows if len(row) == 2}

    def page_sizes(self, suffix: str) -> list[str]:
        """List the huge page sizes that have a file hugetlb.<size>.<suffix>."""
        import os

        try:
            names = os.listdir(self._path) if self._path is not None else []  # noqa: PTH208 - no pathlib at start
        except OSError:
            return []
        parts = (name.split(".") for name in names)
        return sorted(part[1] for part in parts if len(part) == 3 and part[0] == "hugetlb" and part[2] == suffix)


def pids(directory: CgroupDirectory, count: Callable[[], int]) -> PidsStats:
    """Read the number of processes, the same in both versions; `count` counts them where the kernel does not."""
    if not directory.text("pids.current"):
        return PidsStats(count())
    limit = directory.number("pids.max")
    return PidsStats(directory.number("pids.current"), 0 if limit == UNLIMITED else limit)


def _number(text: str) -> int:
    if text == "max":
        return UNLIMITED
    return int(text) if text.isascii() and text.isdecimal() else 0


def device(text: str) -> tuple[int, int] | None:
    """Parse a device's numbers, as in "8:16"; None if they are invalid."""
    major, colon, minor = text.partition(":")
    return (int(major), int(minor)) if colon and major.isdecimal() and minor.isdecimal() else None

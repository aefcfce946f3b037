"""The guest and its agent in numbers, as text that Prometheus reads.

Names and labels are those of Kata's agent, so that its dashboards work.
Sources: proc(5); Documentation/admin-guide/iostats.rst; Prometheus, "Exposition formats" (text, 0.0.4).
"""

from __future__ import annotations

import os
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    #: Values of one metric, each with its labels.
    Samples = Iterable[tuple[dict[str, str], float]]

#: Lines of /proc/self/status that are numbers: kB, and counts.
STATUS = (
    "VmPeak", "VmSize", "VmLck", "VmPin", "VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem", "VmData", "VmStk",
    "VmExe", "VmLib", "VmPTE", "VmSwap", "HugetlbPages", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches",
)  # fmt: skip
CPU = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
DISK = (
    "reads", "merged", "sectors_read", "time_reading", "writes", "writes_merged", "sectors_written", "time_writing",
    "in_progress", "time_in_progress", "weighted_time_in_progress", "discards", "discards_merged", "sectors_discarded",
    "time_discarding", "flushes", "time_flushing",
)  # fmt: skip
NETWORK = (
    "recv_bytes", "recv_packets", "recv_errs", "recv_drop", "recv_fifo", "recv_frame", "recv_compressed",
    "recv_multicast", "sent_bytes", "sent_packets", "sent_errs", "sent_drop", "sent_fifo", "sent_colls",
    "sent_carrier", "sent_compressed",
)  # fmt: skip
#: Names of /proc/meminfo whose words are not separated by capitals.
MEMINFO = {
    "AnonHugePages": "anon_hugepages", "ShmemHugePages": "shmem_hugepages", "Percpu": "per_cpu", "Committed_AS":
    "committed_as", "HugePages_Total": "hugepages_total", "HugePages_Free": "hugepages_free", "HugePages_Rsvd":
    "hugepages_rsvd", "HugePages_Surp": "hugepages_surp", "DirectMap4k": "direct_map_4k", "DirectMap2M":
    "direct_map_2M", "DirectMap1G": "direct_map_1G", "NFS_Unstable": "nfs_unstable",
}  # fmt: skip


class Metrics:
    """Read /proc at every scrape, and count the scrapes."""

    def __init__(self, proc: str = "/proc") -> None:
        self._proc = proc
        self._scrapes = 0

    def text(self) -> str:
        """Scrape once.  What this kernel does not report is left out."""
        self._scrapes += 1
        ticks = os.sysconf("SC_CLK_TCK")
        stat = self._words("self/stat", after=")")  # from field 3 on, proc_pid_stat(5)
        families: tuple[tuple[str, str, str, Callable[[], Samples]], ...] = (
            ("agent_scrape_count", "counter", "Metrics scrape count", lambda: [({}, self._scrapes)]),
            ("agent_threads", "gauge", "Agent process threads", lambda: [({}, float(stat[17]))]),
            ("agent_total_time", "gauge", "Agent process total time",
             lambda: [({}, (int(stat[11]) + int(stat[12])) / ticks)]),
            ("agent_total_vm", "gauge", "Agent process total VM size", lambda: [({}, float(stat[20]))]),
            ("agent_total_rss", "gauge", "Agent process total RSS size",
             lambda: [({}, float(int(stat[21]) * os.sysconf("SC_PAGESIZE")))]),
            ("agent_proc_status", "gauge", "Agent process status.", self._status),
            ("agent_io_stat", "gauge", "Agent process IO statistics.", lambda: self._pairs("self/io")),
            ("agent_proc_stat", "gauge", "Agent process statistics.",
             lambda: _items(zip(("utime", "stime", "cutime", "cstime"), stat[11:15], strict=True))),
            ("guest_load", "gauge", "Guest system load.",
             lambda: _items(zip(("load1", "load5", "load15"), self._words("loadavg")[:3], strict=True))),
            ("guest_tasks", "gauge", "Guest system tasks: those that run, and all.",
             lambda: _items(zip(("cur", "max"), self._words("loadavg")[3].split("/"), strict=True))),
            ("guest_cpu_time", "gauge", "Guest CPU statistics, in milliseconds.", lambda: self._cpus(1000 / ticks)),
            ("guest_vm_stat", "gauge", "Guest virtual memory statistics.", lambda: self._pairs("vmstat")),
            ("guest_netdev_stat", "gauge", "Guest net devices statistics.", self._interfaces),
            ("guest_diskstat", "gauge", "Disks statistics in system.", self._disks),
            ("guest_meminfo", "gauge", "Statistics about memory usage in the system, in bytes.", self._memory),
        )  # fmt: skip
        return "".join(_family(*family) for family in families)

    def _lines(self, file: str) -> list[str]:
        try:
            with open(f"{self._proc}/{file}") as stream:  # noqa: PTH123 - a procfs file
                return stream.read().splitlines()
        except OSError:
            return []  # not reported by this kernel, or for this process

    def _words(self, file: str, after: str = "") -> list[str]:
        text = " ".join(self._lines(file))
        return (text.rpartition(after)[2] if after else text).split()

    def _pairs(self, file: str) -> Samples:
        return _items((words[0].rstrip(":"), words[1]) for words in map(str.split, self._lines(file)) if len(words) > 1)

    def _status(self) -> Samples:
        values = {words[0]: words[1] for words in map(str.split, self._lines("self/status")) if len(words) > 1}
        return _items((name.lower(), values[f"{name}:"]) for name in STATUS if f"{name}:" in values)

    def _cpus(self, milliseconds: float) -> Iterator[tuple[dict[str, str], float]]:
        for name, *ticks in (line.split() for line in self._lines("stat") if line.startswith("cpu")):
            cpu = name.removeprefix("cpu") or "total"
            for item, value in zip(CPU, ticks, strict=False):
                yield {"cpu": cpu, "item": item}, int(value) * milliseconds

    def _interfaces(self) -> Iterator[tuple[dict[str, str], float]]:
        for line in self._lines("net/dev")[2:]:
            name, _, counters = line.partition(":")
            for item, value in zip(NETWORK, counters.split(), strict=False):
                yield {"interface": name.strip(), "item": item}, float(value)

    def _disks(self) -> Iterator[tuple[dict[str, str], float]]:
        for _major, _minor, name, *counters in map(str.split, self._lines("diskstats")):
            for item, value in zip(DISK, counters, strict=False):
                yield {"disk": name, "item": item}, float(value)

    def _memory(self) -> Iterator[tuple[dict[str, str], float]]:
        for line in self._lines("meminfo"):
            name, _, rest = line.partition(":")
            value, *unit = rest.split()
            yield {"item": meminfo_item(name)}, float(int(value) * (1024 if unit == ["kB"] else 1))


def meminfo_item(name: str) -> str:
    """Return a line's name in snake case: "Active(anon)" → "active_anon", "SReclaimable" → "s_reclaimable"."""
    if name in MEMINFO:
        return MEMINFO[name]
    plain = name.replace("(", "_").rstrip(")")
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", plain).lower()


def _items(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[dict[str, str], float]]:
    for item, value in pairs:
        yield {"item": item}, float(value)


def _family(name: str, kind: str, about: str, samples: Callable[[], Samples]) -> str:
    try:
        lines = [f"kata_{name}{_labels(labels)} {value:.15g}\n" for labels, value in samples()]
    except (ValueError, IndexError):
        return ""  # a file in an unknown format
    return f"# HELP kata_{name} {about}\n# TYPE kata_{name} {kind}\n{''.join(lines)}" if lines else ""


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    escaped = {
        key: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for key, value in labels.items()
    }
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped.items()) + "}"

"""Test a container's resource usage: from kernel files to the message sent."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from caisson.agent.api.conversions import fill
from caisson.agent.base.errors import NotFound
from caisson.agent.libcontainer.cgroups.events import OomCounter
from caisson.agent.libcontainer.cgroups.stats import UNLIMITED, BlkioEntry, CgroupStats, HugetlbStats, MemoryData
from caisson.agent.libcontainer.cgroups.v2 import stats as v2_stats
from caisson.agent.model.oom import MAX_EVENTS, OomEvents
from caisson.proto.kata1 import agent_pb2

V2 = {
    "cpu.stat": "usage_usec 7\nuser_usec 4\nsystem_usec 3\nnr_periods 10\nnr_throttled 2\nthrottled_usec 5\n",
    "memory.current": "1000\n",
    "memory.peak": "2000\n",
    "memory.max": "4096\n",
    "memory.swap.current": "24\n",
    "memory.swap.max": "max\n",
    "memory.events": "low 0\nhigh 0\nmax 6\noom 1\noom_kill 1\n",
    "memory.stat": "anon 5\nfile 77\nkernel 88\n",
    "pids.current": "3\n",
    "pids.max": "max\n",
    "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n254:16 rbytes=9 cost.usage=1\n\n",
    "hugetlb.2MB.current": "2097152\n",
    "hugetlb.2MB.events": "max 8\n",
    "hugetlb.2MB.rsvd.current": "0\n",
    "hugetlb.1GB.current": "0\n",
}


def directory(path: Path, contents: dict[str, str]) -> str:
    for name, text in contents.items():
        (path / name).write_text(text)
    return str(path)


def test_v2(tmp_path: Path) -> None:
    stats = v2_stats.read(directory(tmp_path, V2), lambda: 99)
    cpu = stats.cpu_stats
    assert (cpu.cpu_usage.total_usage, cpu.cpu_usage.usage_in_usermode, cpu.cpu_usage.usage_in_kernelmode) == (
        7000, 4000, 3000,
    )  # fmt: skip
    throttling = cpu.throttling_data
    assert (throttling.periods, throttling.throttled_periods, throttling.throttled_time) == (10, 2, 5000)
    memory = stats.memory_stats
    assert memory.usage == MemoryData(1000, 2000, 6, 4096)
    assert memory.swap_usage == MemoryData(1024, 0, 0, UNLIMITED)
    assert (memory.kernel_usage.usage, memory.cache, memory.use_hierarchy) == (88, 77, True)
    assert memory.stats == {"anon": 5, "file": 77, "kernel": 88}
    assert (stats.pids_stats.current, stats.pids_stats.limit) == (3, 0)
    assert stats.blkio_stats.io_service_bytes_recursive == (
        BlkioEntry(8, 0, "Read", 1), BlkioEntry(8, 0, "Write", 2), BlkioEntry(8, 0, "Discard", 5),
        BlkioEntry(254, 16, "Read", 9),
    )  # fmt: skip
    assert [entry.value for entry in stats.blkio_stats.io_serviced_recursive] == [3, 4, 6]
    assert stats.hugetlb_stats == {"2MB": HugetlbStats(2097152, 0, 8), "1GB": HugetlbStats()}


def test_with_a_limit_of_swap(tmp_path: Path) -> None:
    stats = v2_stats.read(directory(tmp_path, V2 | {"memory.swap.max": "4\n"}), lambda: 99)
    assert stats.memory_stats.swap_usage.limit == 4100


def test_missing_statistics_are_zero(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        stats = v2_stats.read(str(path), lambda: 4)
        assert stats == CgroupStats(
            pids_stats=stats.pids_stats, blkio_stats=stats.blkio_stats, hugetlb_stats={}
        )  # fmt: skip
        assert (stats.pids_stats.current, stats.pids_stats.limit) == (4, 0)
        assert not any(vars(stats.blkio_stats).values())


def test_the_message_has_it_all(tmp_path: Path) -> None:
    message = agent_pb2.CgroupStats()
    fill(message, v2_stats.read(directory(tmp_path, V2), lambda: 99))
    assert message.cpu_stats.throttling_data.throttled_time == 5000
    assert message.memory_stats.swap_usage.limit == UNLIMITED
    assert dict(message.memory_stats.stats) == {"anon": 5, "file": 77, "kernel": 88}
    assert [(e.major, e.minor, e.op, e.value) for e in message.blkio_stats.io_serviced_recursive] == [
        (8, 0, "Read", 3), (8, 0, "Write", 4), (8, 0, "Discard", 6),
    ]  # fmt: skip
    assert message.hugetlb_stats["2MB"].failcnt == 8 and message.hugetlb_stats["1GB"].usage == 0
    empty = agent_pb2.CgroupStats()
    fill(empty, CgroupStats())
    assert empty.HasField("memory_stats") and empty.cpu_stats.HasField("cpu_usage")


def test_kills_are_told_once() -> None:
    counts, told = [2], []
    kills = OomCounter(lambda: counts[-1], lambda: told.append(counts[-1]))
    for count in (2, 3, 3, 0, 5):
        counts.append(count)
        kills.check()
    assert told == [3, 5]


async def test_an_event_goes_to_one_who_waits_and_none_is_lost() -> None:
    events = OomEvents()
    impatient, patient = (asyncio.ensure_future(events.next()) for _ in range(2))
    await asyncio.sleep(0)
    events.add("one")
    impatient.cancel()  # woken, but cancelled before it looks
    assert await patient == "one"
    events.add("two")
    assert await events.next() == "two"
    for number in range(MAX_EVENTS + 5):
        events.add(str(number))
    assert await events.next() == "5"


async def test_oom_waiters_end_with_the_sandbox() -> None:
    events = OomEvents()
    waiting = [asyncio.ensure_future(events.next()) for _ in range(3)]
    await asyncio.sleep(0)
    events.end()
    for wait in waiting:
        with pytest.raises(NotFound):
            await wait
    events.add("later")
    assert await events.next() == "later"

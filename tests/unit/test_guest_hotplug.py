"""Test hot-plugged CPUs and memory, in a tree like sysfs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from caisson.agent.base.errors import MissingArgument, SystemCallFailed
from caisson.agent.guest import hotplug


def switch(system: Path, name: str, value: str = "0") -> Path:
    kind = name.rstrip("0123456789")
    (system / kind / name).mkdir(parents=True)
    (system / kind / name / "online").write_text(f"{value}\n")
    return system / kind / name / "online"


async def test_as_many_cpus_as_asked_for(tmp_path: Path) -> None:
    (tmp_path / "cpu/cpu0").mkdir(parents=True)  # the first cannot be taken offline, and has no `online` file
    switch(tmp_path, "cpu1", "1")
    off = [switch(tmp_path, f"cpu{number}") for number in (10, 2, 3)]
    (tmp_path / "cpu/cpufreq").mkdir()
    await hotplug.online_cpus(2, str(tmp_path))
    assert [path.read_text().strip() for path in off] == ["0", "1", "1"]


async def test_a_cpu_that_comes_late(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    waiting = asyncio.ensure_future(hotplug.online_cpus(1, str(tmp_path)))
    while not waiting.done():
        await asyncio.sleep(0)
        if not (tmp_path / "cpu/cpu1").exists():
            switch(tmp_path, "cpu1")
    await waiting
    assert (tmp_path / "cpu/cpu1/online").read_text() == "1"


def test_too_few_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplug, "CPU_TIMEOUT", 0.0)
    switch(tmp_path, "cpu1")
    with pytest.raises(SystemCallFailed, match="only 1 of 2 were connected"):
        asyncio.run(hotplug.online_cpus(2, str(tmp_path)))


async def test_cpus_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel updates its list when a CPU goes online; here it is computed from the `online` files on reading."""
    switches = [switch(tmp_path, "cpu1", "1"), *(switch(tmp_path, f"cpu{number}") for number in (2, 3))]

    def count(file: str) -> int:
        assert file == f"{tmp_path}/cpu/online"
        return 1 + sum(path.read_text().strip() == "1" for path in switches)

    monkeypatch.setattr(hotplug, "_count_online", count)
    await hotplug.online_total(2, str(tmp_path))  # unchanged
    await hotplug.online_total(3, str(tmp_path))
    assert [path.read_text().strip() for path in switches] == ["1", "1", "0"]
    monkeypatch.setattr(hotplug, "CPU_TIMEOUT", 0.0)
    with pytest.raises(SystemCallFailed, match="only 4 of 5 CPUs are online"):
        await hotplug.online_total(5, str(tmp_path))


@pytest.mark.parametrize(("text", "count"), [("0\n", 1), ("0-3\n", 4), ("0-1,4,6-7\n", 5), ("", 0)])
def test_a_list_of_cpus_is_counted(tmp_path: Path, text: str, count: int) -> None:
    (tmp_path / "online").write_text(text)
    assert hotplug._count_online(str(tmp_path / "online")) == count
    assert hotplug._count_online(str(tmp_path / "none")) == 0


def test_memory(tmp_path: Path) -> None:
    off = [switch(tmp_path, f"memory{number}") for number in (32, 33)]
    hotplug.online_memory(str(tmp_path))
    assert [path.read_text() for path in off] == ["1", "1"]
    hotplug.online_memory(str(tmp_path / "nowhere"))


def test_probing(tmp_path: Path) -> None:
    with pytest.raises(SystemCallFailed, match="Could not probe memory at 0x40000000: no such file"):
        hotplug.probe_memory([0x40000000], str(tmp_path))
    (tmp_path / "memory").mkdir()
    hotplug.probe_memory([0x40000000, 0x48000000], str(tmp_path))
    assert (tmp_path / "memory/probe").read_text() == "0x48000000"


def test_online_cpus_rejects_a_count_of_zero() -> None:
    with pytest.raises(MissingArgument, match="requested number of CPUs '0' must be greater than 0"):
        hotplug.check_count(0, True)
    hotplug.check_count(0, False)

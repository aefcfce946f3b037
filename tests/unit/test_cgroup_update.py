"""Test changing the limits of a cgroup: all or none.  Files play the kernel, with its quirks."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.libcontainer.cgroups import CgroupError, files
from caisson.agent.libcontainer.cgroups import device_program as devices
from caisson.agent.libcontainer.cgroups.files import restore_value
from caisson.agent.libcontainer.cgroups.v2.cgroup import CgroupV2
from caisson.agent.libcontainer.config.resources import DeviceRule, Resources

FILES = {
    "cgroup.controllers": "cpuset cpu io memory pids hugetlb",
    "memory.max": "max",
    "memory.low": "0",
    "memory.swap.max": "max",
    "memory.current": "5000",
    "memory.swap.current": "100",
    "cpu.max": "max 100000",
    "cpu.weight": "100",
    "cpuset.cpus": "",
    "pids.max": "max",
    "io.max": "8:0 rbps=1 wbps=max riops=max wiops=max",
}


class Kernel:
    """A cgroup's directory whose files accept values whole, or reject them."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.writes: list[tuple[str, str]] = []
        self.refused: dict[str, int] = {}  # by file, or by file and value
        for name, text in FILES.items():
            (directory / name).write_text(f"{text}\n")
        monkeypatch.setattr(files, "write", self.write)
        self.rules: list[tuple[DeviceRule, ...]] = []
        monkeypatch.setattr(devices, "attach", self.attach)

    def write(self, path: str, value: str) -> None:
        name = Path(path).name
        self.writes.append((name, value))
        for key in (name, f"{name}={value}"):
            if key in self.refused:
                raise OSError(self.refused[key], os.strerror(self.refused[key]))
        key, space, _ = value.partition(" ")
        if name == "io.max" and space:
            lines = [line for line in (self.directory / name).read_text().splitlines() if not line.startswith(key)]
            value = "\n".join([*lines, value])
        (self.directory / name).write_text(f"{value}\n")

    def attach(self, cgroup: int, rules: tuple[DeviceRule, ...], replaces: int = -1) -> int:
        if "devices" in self.refused:
            raise OSError(self.refused["devices"], os.strerror(self.refused["devices"]))
        self.rules.append(rules)
        return os.open("/dev/null", os.O_RDONLY)

    def now(self) -> dict[str, str]:
        return {name: (self.directory / name).read_text().strip() for name in FILES}


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


def update(kernel: Kernel, before: dict[str, Any], document: dict[str, Any]) -> None:
    """Limit a new cgroup by one configuration, then change it to another."""
    cgroup = CgroupV2(str(kernel.directory), set())
    try:
        cgroup.apply(Resources.from_json(before))
        kernel.writes.clear()
        asyncio.run(cgroup.update(Resources.from_json(before).updated(Resources.from_json(document))))
    finally:
        cgroup.close()


WANTED = {
    "memory": {"limit": 1 << 20, "swap": 2 << 20},
    "cpu": {"shares": 2048, "quota": 50000, "cpus": "0-1"},
    "blockIO": {
        "throttleWriteBpsDevice": [{"major": 8, "minor": 0, "rate": 7}, {"major": 8, "minor": 16, "rate": 8}],
    },
    "pids": {"limit": 5},
    "devices": [{"allow": True, "type": "c", "major": 10, "minor": 5, "access": "rw"}],
}


def test_everything_is_changed(kernel: Kernel) -> None:
    update(kernel, {"pids": {"limit": 9}}, WANTED)
    now = kernel.now()
    assert (now["memory.max"], now["memory.swap.max"], now["cpu.max"]) == ("1048576", "1048576", "50000 100000")
    assert (now["cpuset.cpus"], now["pids.max"]) == ("0-1", "5")
    assert [len(rules) for rules in kernel.rules] == [0, 1]


@pytest.mark.parametrize(
    "file", ["memory.swap.max", "memory.max", "cpu.weight", "cpu.max", "cpuset.cpus", "io.max=8:16 wbps=8", "pids.max",
             "devices"]
)  # fmt: skip
def test_after_a_failure_all_is_as_before(kernel: Kernel, file: str) -> None:
    before = {"cpu": {"cpus": "0"}, "memory": {"limit": 1 << 19, "swap": 1 << 19}}
    cgroup = CgroupV2(str(kernel.directory), set())
    try:
        cgroup.apply(Resources.from_json(before))
        state, rules = kernel.now(), list(kernel.rules)
        kernel.refused[file] = errno.EINVAL
        with pytest.raises(CgroupError, match=r"linux\.resources\.\S+: .*Invalid argument"):
            asyncio.run(cgroup.update(Resources.from_json(before).updated(Resources.from_json(WANTED))))
        now = kernel.now()
        left = now.pop("io.max").splitlines()
        assert state.pop("io.max") in left
        assert all("=7" not in line and "=8" not in line for line in left)
        assert now == state
        assert kernel.rules == rules
    finally:
        cgroup.close()


def test_update_reports_values_that_cannot_be_restored(kernel: Kernel) -> None:
    kernel.refused = {"pids.max": errno.EINVAL, "memory.max=max": errno.EBUSY}
    with pytest.raises(CgroupError) as caught:
        update(kernel, {}, {"memory": {"limit": 4096}, "pids": {"limit": 3}})
    assert str(caught.value) == (
        "linux.resources.pids.limit: pids.max = '3': Invalid argument; and the previous values could not be restored: "
        "memory.max = 'max' (Device or resource busy)"
    )


def test_update_writes_only_changed_values(kernel: Kernel) -> None:
    before = {"memory": {"limit": 1 << 20}, "pids": {"limit": 9}, "devices": [{"allow": True, "type": "a"}]}
    update(kernel, before, {"pids": {"limit": 10}})
    assert kernel.writes == [("pids.max", "10")]
    assert len(kernel.rules) == 1


def test_unrelated_limits_leave_the_device_rules_alone(kernel: Kernel) -> None:
    rules = [{"allow": False, "type": "a"}, {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rw"}]
    update(kernel, {"devices": rules}, {"cpu": {"shares": 512}})
    assert len(kernel.rules) == 1


@pytest.mark.parametrize(
    ("memory", "text"),
    [
        (
            {"limit": 4999},
            "linux.resources.memory.limit: rejecting memory limit 4999: it is below the 5000 bytes in use",
        ),
        (
            {"limit": 5000, "swap": 5099},
            "linux.resources.memory.swap: rejecting memory+swap limit 5099: it is below the 5100 bytes in use",
        ),
        ({"limit": 5000, "swap": 5100}, ""),
        ({"limit": -1}, ""),
    ],
)
def test_a_limit_below_what_is_in_use_is_refused_where_that_is_asked_for(
    kernel: Kernel, memory: dict[str, int], text: str
) -> None:
    update(kernel, {}, {"memory": memory})
    if not text:
        update(kernel, {}, {"memory": memory | {"checkBeforeUpdate": True}})
        return
    with pytest.raises(CgroupError) as caught:
        update(kernel, {}, {"memory": memory | {"checkBeforeUpdate": True}})
    assert str(caught.value) == text


def test_a_file_that_the_kernel_lacks_is_named(kernel: Kernel) -> None:
    (kernel.directory / "cpu.weight").unlink()
    with pytest.raises(CgroupError, match=r"^linux\.resources\.cpu\.shares: this kernel has no cpu\.weight$"):
        update(kernel, {}, {"cpu": {"shares": 5}})
    with pytest.raises(CgroupError, match=r"rdma\.x: the cgroup controller 'rdma' is not available here"):
        update(kernel, {}, {"rdma": {"x": {"hcaHandles": 1}}})


def test_no_swap_is_no_limit_of_swap(kernel: Kernel) -> None:
    (kernel.directory / "memory.swap.max").unlink()
    update(kernel, {}, {"memory": {"limit": 5, "swap": -1}})
    with pytest.raises(CgroupError, match=r"memory\.swap: this kernel has no memory\.swap\.max"):
        update(kernel, {}, {"memory": {"limit": 5, "swap": 6}})


def test_a_weight_goes_where_the_kernel_has_one(kernel: Kernel) -> None:
    document = {"blockIO": {"weight": 505}}
    with pytest.raises(CgroupError, match=r"blockIO\.weight: this kernel has no io\.bfq\.weight"):
        update(kernel, {}, document)
    (kernel.directory / "io.weight").write_text("default 100\n")
    update(kernel, {}, document)
    assert (kernel.directory / "io.weight").read_text() == "default 5000\n"
    (kernel.directory / "io.bfq.weight").write_text("default 100\n")
    update(kernel, {}, document)
    assert (kernel.directory / "io.bfq.weight").read_text() == "default 505\n"


@pytest.mark.parametrize(
    ("file", "value", "before", "expected"),
    [
        ("cpu.max", "1 2", "max 100000\n", "max 100000"),
        ("cpuset.cpus", "0", "\n", ""),
        ("io.max", "8:0 rbps=3", "8:0 rbps=1 wbps=max\n8:1 rbps=2\n", "8:0 rbps=1 wbps=max"),
        ("io.max", "8:0 rbps=3 wiops=4", "8:1 rbps=2\n", "8:0 rbps=max wiops=max"),
        ("io.latency", "8:0 target=75", "", "8:0 target=0"),
        ("io.weight", "default 7", "default 100\n8:0 5\n", "default 100"),
        ("io.weight", "8:1 7", "default 100\n8:0 5\n", "8:1 default"),
        ("io.bfq.weight", "7", "default 100\n8:0 5\n", "default 100"),
        ("rdma.max", "mlx hca_handle=3", "mlx hca_handle=max hca_object=max\n", "mlx hca_handle=max hca_object=max"),
        ("blkio.throttle.read_bps_device", "8:0 5", "", "8:0 0"),
        ("net_prio.ifpriomap", "lo 5", "lo 0\neth0 3\n", "lo 0"),
        ("memory.oom_control", "1", "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n", "0"),
    ],
)
def test_values_before(file: str, value: str, before: str, expected: str) -> None:
    assert restore_value(file, value, before) == expected


def test_update_replaces_earlier_values() -> None:
    before = Resources.from_json(
        {
            "cpu": {"quota": 5, "period": 6, "cpus": "0"},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 1}, {"pageSize": "1GB", "limit": 2}],
            "devices": [{"allow": True, "type": "a"}],
            "unified": {"a.b": "1"},
        }
    )
    after = before.updated(
        Resources.from_json(
            {
                "cpu": {"quota": 7, "period": 0},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
                "unified": {"c.d": "2"},
                "pids": {"limit": -1},
            }
        )
    )
    assert (after.cpu.quota, after.cpu.period, after.cpu.cpus) == (7, 6, "0")
    assert after.huge_pages == {"2MB": 0, "1GB": 2}
    assert after.unified == {"a.b": "1", "c.d": "2"}
    assert (after.devices, after.pids_limit) == (before.devices, -1)

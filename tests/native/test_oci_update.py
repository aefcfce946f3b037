"""Test `update` of the OCI command line: which file each option sets, what is kept, and what is rejected."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.native.oci_support import Oci, bundle, cgroup_of, edit

pytestmark = pytest.mark.root
NAME = f"oci-update-{os.getpid()}"


UPDATES: list[tuple[str, str, str, str]] = [
    ("--cpu-period", "50000", "cpu/cpu.cfs_period_us", "50000"),
    ("--cpu-quota", "40000", "cpu/cpu.cfs_quota_us", "40000"),
    ("--cpu-burst", "10000", "cpu/cpu.cfs_burst_us", "10000"),
    ("--cpu-burst", "0", "cpu/cpu.cfs_burst_us", "0"),
    ("--cpu-quota", "-1", "cpu/cpu.cfs_quota_us", "-1"),
    ("--cpu-rt-period", "900000", "cpu/cpu.rt_period_us", "900000"),
    ("--cpu-rt-runtime", "500", "cpu/cpu.rt_runtime_us", "500"),
    ("--cpu-share", "300", "cpu/cpu.shares", "300"),
    ("--cpu-idle", "1", "cpu/cpu.idle", "1"),
    ("--cpuset-cpus", "0", "cpuset/cpuset.cpus", "0"),
    ("--cpuset-mems", "0", "cpuset/cpuset.mems", "0"),
    ("--memory", "40m", "memory/memory.limit_in_bytes", str(40 << 20)),
    ("--memory-reservation", "20M", "memory/memory.soft_limit_in_bytes", str(20 << 20)),
    ("--pids-limit", "25", "pids/pids.max", "25"),
]


def test_each_option_of_update_reaches_its_file(oci: Oci, sleeper: Path) -> None:
    pid = oci.running(sleeper, NAME)
    for option, value, file, expected in UPDATES:
        controller, _, name = file.partition("/")
        path = cgroup_of(pid, controller) / name
        if path.exists():
            oci.ok("update", option, value, NAME)
            assert path.read_text() == f"{expected}\n", option
        else:  # no CONFIG_RT_GROUP_SCHED, or the controller is not mounted
            result = oci("update", option, value, NAME)
            assert result.status == 1 and result.message.startswith("linux.resources."), result
            assert result.message.endswith((f"this kernel has no {name}", "is not available here")), result


def test_a_burst_above_the_quota_is_refused_and_nothing_changes(oci: Oci, sleeper: Path) -> None:
    cpu = cgroup_of(oci.running(sleeper, NAME), "cpu")
    result = oci("update", "--cpu-period", "50000", "--cpu-quota", "20000", "--cpu-burst", "99999999", NAME)
    assert result.status == 1 and "cpu.cfs_burst_us" in result.message
    assert [(cpu / f"cpu.cfs_{name}_us").read_text() for name in ("period", "quota", "burst")] == [
        "100000\n", "-1\n", "0\n",
    ]  # fmt: skip


def test_update_checks_what_is_in_use_where_that_is_asked_for(oci: Oci, sleeper: Path) -> None:
    memory = cgroup_of(oci.running(sleeper, NAME), "memory") / "memory.limit_in_bytes"
    before = memory.read_text()
    limits = {"memory": {"limit": 4096, "checkBeforeUpdate": True}}
    result = oci("update", "-r", "-", NAME, stdin=json.dumps(limits))
    assert result.status == 1 and "rejecting memory limit 4096" in result.message
    assert memory.read_text() == before
    limits["memory"]["limit"] = 64 << 20
    oci.ok("update", "--resources=-", NAME, stdin=json.dumps(limits))
    assert memory.read_text() == f"{64 << 20}\n"


def test_update_keeps_what_is_not_given(oci: Oci, sleeper: Path) -> None:
    cpu = cgroup_of(oci.running(sleeper, NAME), "cpu")
    oci.ok("update", "--cpu-quota", "40000", "--cpu-period", "80000", NAME)
    oci.ok("update", "--cpu-quota", "20000", NAME)
    assert [(cpu / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")] == ["20000\n", "80000\n"]
    oci.ok("update", "--cpu-period", "100000", NAME)
    assert [(cpu / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")] == ["20000\n", "100000\n"]


def test_update_warns_of_kernel_memory(oci: Oci, sleeper: Path) -> None:
    oci.running(sleeper, NAME)
    for option in ("--kernel-memory", "--kernel-memory-tcp"):
        result = oci("update", option, "5M", NAME)
        assert result.status == 0 and "Kernel memory settings are ignored" in result.err


def test_kernel_memory_of_a_configuration_is_ignored(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "true")
    edit(made, lambda value: value["linux"]["resources"].update(memory={"kernel": 50 << 20, "kernelTCP": 50 << 20}))
    result = oci("run", "-b", str(made), NAME)
    assert result.status == 0 and "Kernel memory settings are ignored and will be removed" in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-r", "/nothere", NAME], "open /nothere: no such file or directory"),
        (["--cpu-period", "x", NAME], "cpu-period"),
        (["--pids-limit", "x", NAME], "pids-limit"),
        (["--mem-bw-schema", "MB:0=20", NAME], "Intel RDT/MBA"),
        (["--kernel-memory", "x", NAME], "invalid value for kernel-memory: invalid size: 'x'"),
        (["--cpu-share", "1", NAME], "the minimum allowed cpu-shares is 2"),
        (["--cpu-share", "262145", NAME], "the maximum allowed cpu-shares is 262144"),
    ],
)
def test_update_that_is_refused(oci: Oci, sleeper: Path, words: list[str], message: str) -> None:
    oci.running(sleeper, NAME)
    result = oci("update", *words)
    assert result.status == 1 and message in result.err + result.out
    assert "Traceback" not in result.err

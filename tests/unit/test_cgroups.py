"""Test cgroup v2: limits as files and values, device rules as eBPF instructions (run by a tiny interpreter)."""

from __future__ import annotations

import threading
from pathlib import Path
from struct import iter_unpack
from typing import Any

import pytest

from caisson.agent.libcontainer.cgroups import CgroupError, HierarchyV2
from caisson.agent.libcontainer.cgroups import device_program as devices
from caisson.agent.libcontainer.cgroups.base import signal_pids
from caisson.agent.libcontainer.cgroups.v2.settings import io_weight, settings, weight
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.resources import DeviceRule, Resources
from caisson.agent.libcontainer.state import State, check_id


def test_finds_the_hierarchy(tmp_path: Path) -> None:
    info = tmp_path / "mountinfo"
    info.write_text(
        "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
        "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
        "41 31 0:38 / /sys/fs/cgroup/uni\\040fied rw,relatime shared:4 - cgroup2 cgroup2 rw\n"
    )
    found = HierarchyV2.find(mountinfo=str(info))
    assert found is not None and found.root == "/sys/fs/cgroup/uni fied"
    info.write_text("31 23 0:28 / / rw - ext4 /dev/vda rw\n")
    assert HierarchyV2.find(mountinfo=str(info)) is None


@pytest.mark.parametrize("path", ["", "/", "../x", "a/../../b", "a/./b", "a\nb", "a/" + "x" * 256])
def test_paths_that_are_none(path: str, tmp_path: Path) -> None:
    with pytest.raises(CgroupError):
        HierarchyV2(str(tmp_path)).create(path)
    assert list(tmp_path.iterdir()) == []


def test_pids_that_are_free_or_a_threads_are_not_signalled() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        signal_pids([thread.native_id or 0, 1 << 22], 9)
        assert thread.is_alive()
    finally:
        done.set()
        thread.join()


def values(document: dict[str, Any], **now: str) -> list[tuple[str, str]]:
    """Return the files and values that a configuration results in."""
    found = settings(Resources.from_json(document), lambda file: now.get(file.replace(".", "_")))
    return [(setting.file, setting.value) for setting in found]


def test_settings() -> None:
    resources = {
        "memory": {"limit": 100, "swap": 150, "reservation": 50, "kernel": 0, "kernelTCP": -1, "swappiness": 0},
        "cpu": {"shares": 1024, "quota": 5000, "period": 0, "burst": 7, "cpus": "0", "mems": "0"},
        "pids": {"limit": -1},
        "blockIO": {
            "weight": 505,
            "weightDevice": [{"major": 8, "minor": 16, "weight": 1000}],
            "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 9}],
            "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 0}],
        },
        "hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}],
        "network": {"classID": 0, "priorities": []},
        "rdma": {"mlx5_0": {"hcaHandles": 3}, "none": {}},
        "unified": {"memory.high": "7", "io.max": "1:2 rbps=3\n4:5 wbps=6"},
    }
    assert values(resources) == [
        ("memory.swap.max", "50"), ("memory.max", "100"), ("memory.low", "50"), ("cpu.weight", "100"),
        ("cpu.max", "5000 100000"), ("cpu.max.burst", "7"), ("cpuset.cpus", "0"), ("cpuset.mems", "0"),
        ("pids.max", "max"), ("io.bfq.weight", "default 505"), ("io.bfq.weight", "8:16 1000"),
        ("io.max", "8:0 rbps=9"), ("io.max", "8:0 wiops=max"),
        ("hugetlb.2MB.max", "4194304"), ("hugetlb.2MB.rsvd.max", "4194304"), ("rdma.max", "mlx5_0 hca_handle=3"),
        ("memory.high", "7"), ("io.max", "1:2 rbps=3"), ("io.max", "4:5 wbps=6"),
    ]  # fmt: skip
    assert values({"memory": {"limit": 0}, "cpu": {"quota": 0}}) == []
    assert values({"pids": {"limit": 0}, "cpu": {"burst": 0}}) == [("cpu.max.burst", "0"), ("pids.max", "1")]


def test_a_burst_is_never_above_its_quota() -> None:
    document = {"cpu": {"quota": 5000, "burst": 4000}}
    assert [file for file, _ in values(document, cpu_max_burst="0\n")] == ["cpu.max", "cpu.max.burst"]
    assert [file for file, _ in values(document, cpu_max_burst="9000\n")] == ["cpu.max.burst", "cpu.max"]


def test_an_idle_group_has_no_weight() -> None:
    assert values({"cpu": {"idle": 1, "shares": 5}}) == [("cpu.idle", "1")]
    assert values({"cpu": {"idle": 0, "shares": 1024}}) == [("cpu.idle", "0"), ("cpu.weight", "100")]


@pytest.mark.parametrize(("shares", "expected"), [(10, 1), (505, 5000), (1000, 10000)])
def test_io_weight(shares: int, expected: int) -> None:
    assert io_weight(shares) == expected


@pytest.mark.parametrize("memory", [{"swap": 10}, {"swap": 10, "limit": 11}, {"swap": 10, "limit": -1}])
def test_swap_without_a_limit_below_it_makes_no_sense(memory: dict[str, int]) -> None:
    with pytest.raises(SpecError, match=r"linux\.resources\.memory\.swap: is memory plus swap"):
        values({"memory": memory})


@pytest.mark.parametrize("file", ["../x", "cgroup.procs", "", "a/b"])
def test_unified_is_for_limits(file: str) -> None:
    with pytest.raises(SpecError):
        values({"unified": {file: "1"}})


@pytest.mark.parametrize(("shares", "expected"), [(0, 1), (2, 1), (1024, 100), (262144, 10000)])
def test_weight(shares: int, expected: int) -> None:
    assert weight(shares) == expected


def _allowed(rules: list[DeviceRule], type_: str, major: int, minor: int, access: str) -> bool:
    """Run the program: return what the kernel would decide."""
    code = [
        (opcode, registers & 15, registers >> 4, offset, imm)
        for opcode, registers, offset, imm in iter_unpack("=BBhi", devices.program(rules))
    ]
    wanted = sum(devices.ACCESS[letter] for letter in access)
    context = {0: wanted << 16 | devices.TYPES[type_], 4: major, 8: minor}
    register = [0] * 6
    at = 0
    while True:
        opcode, dst, src, offset, imm = code[at]
        at += 1
        if opcode == devices.LOAD_WORD:
            assert src == 1
            register[dst] = context[offset]
        elif opcode == devices.MOVE_REG:
            register[dst] = register[src]
        elif opcode == devices.MOVE_IMM:
            register[dst] = imm
        elif opcode == devices.AND_IMM:
            register[dst] &= imm & (1 << 64) - 1
        elif opcode == devices.SHIFT_RIGHT_IMM:
            register[dst] >>= imm
        elif opcode == devices.JUMP_NE_IMM:
            at += offset if register[dst] != imm else 0
        elif opcode == devices.JUMP_EQ_IMM:
            at += offset if register[dst] == imm else 0
        else:
            assert opcode == devices.EXIT
            return bool(register[0])


DENY_ALL = DeviceRule(False, "a", None, None, "rwm")
ALLOW_ALL = DeviceRule(True, "a", None, None, "rwm")


@pytest.mark.parametrize(
    ("rules", "access", "allowed"),
    [
        ([], ("c", 1, 3, "rw"), True),  # null: always allowed
        ([], ("c", 136, 77, "rw"), True),  # a terminal
        ([], ("c", 1, 11, "r"), False),  # kmsg
        ([], ("c", 1, 11, "m"), True),  # a node may be created, not opened
        ([], ("b", 254, 0, "r"), False),
        ([], ("b", 254, 0, "m"), True),
        ([ALLOW_ALL], ("b", 254, 0, "rw"), True),
        ([ALLOW_ALL, DENY_ALL], ("b", 254, 0, "r"), False),
        ([ALLOW_ALL, DeviceRule(False, "b", 254, 0, "rw")], ("b", 254, 0, "r"), False),
        ([ALLOW_ALL, DeviceRule(False, "b", 254, 0, "w")], ("b", 254, 0, "r"), True),
        ([ALLOW_ALL, DeviceRule(False, "b", 254, 0, "w")], ("b", 254, 0, "rw"), False),
        ([ALLOW_ALL, DeviceRule(False, "b", 254, 0, "rw")], ("b", 254, 1, "r"), True),
        ([DENY_ALL, DeviceRule(True, "c", 10, None, "r")], ("c", 10, 5, "r"), True),
        ([DENY_ALL, DeviceRule(True, "c", 10, None, "r")], ("c", 10, 5, "rw"), False),
        ([DeviceRule(True, "c", 10, 5, "r"), DeviceRule(True, "c", 10, None, "w")], ("c", 10, 5, "rw"), True),
        ([DeviceRule(True, "c", 10, 5, "rw"), DeviceRule(False, "c", 10, 5, "w")], ("c", 10, 5, "r"), True),
        ([DeviceRule(True, "c", 10, 5, "rw"), DENY_ALL], ("c", 10, 5, "r"), False),
    ],
)  # fmt: skip
def test_device_rules(rules: list[DeviceRule], access: tuple[str, int, int, str], allowed: bool) -> None:
    assert _allowed(rules, *access) is allowed


def test_state_round_trip(tmp_path: Path) -> None:
    state = State(
        "c1", 42, 1234, "2026-11-23T12:35:44.6Z", {"": "/sys/fs/cgroup/x"}, {"name": "a=b"},
        bundle="/b=c", rootfs="/b=c/rootfs", joined={"network": "/run/netns/x"}, resources={"pids": {"limit": 7}},
    )  # fmt: skip
    state.save(str(tmp_path))
    assert State.load(str(tmp_path)) == state
    assert (tmp_path / "state.json").stat().st_mode & 0o777 == 0o600
    assert state.to_json()["namespace_paths"]["NEWNS"] == "/proc/42/ns/mnt"  # type: ignore[index]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a\n", "ä", "x" * 256])
def test_ids(name: str) -> None:
    with pytest.raises(SpecError):
        check_id(name)

"""Test cgroup v1: device rules as the kernel lists them, files and values, counters, and mounts for a container."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from caisson.agent.libcontainer.cgroups.stats import UNLIMITED, BlkioEntry, CgroupStats, HugetlbStats, MemoryData
from caisson.agent.libcontainer.cgroups.v1 import stats as v1_stats
from caisson.agent.libcontainer.cgroups.v1.ancestors import chain, fill_cpuset, raise_realtime, widen_cpuset
from caisson.agent.libcontainer.cgroups.v1.devices import DeviceList, changes, resolve
from caisson.agent.libcontainer.cgroups.v1.settings import settings
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.resources import DeviceRule, Resources
from caisson.agent.libcontainer.config.spec import Mount
from caisson.agent.libcontainer.plan.mounts import PlannedMount, expand_cgroups, plan_mount

ALLOW_ALL, DENY_ALL = (DeviceRule(allow, "a", None, None, "rwm") for allow in (True, False))
ALWAYS = resolve(()).exceptions


def allowed(type_: str, major: int | None, minor: int | None, access: str) -> DeviceRule:
    return DeviceRule(True, type_, major, minor, access)


def denied(type_: str, major: int | None, minor: int | None, access: str) -> DeviceRule:
    return DeviceRule(False, type_, major, minor, access)


@pytest.mark.parametrize(
    ("rules", "default", "exceptions"),
    [
        ([], False, {}),
        ([allowed("c", 10, 5, "r"), allowed("c", 10, 5, "w")], False, {("c", 10, 5): "rw"}),
        ([allowed("c", 10, 5, "rw"), denied("c", 10, 5, "w")], False, {("c", 10, 5): "r"}),
        ([allowed("c", 10, 5, "rw"), denied("c", 10, None, "rwm")], False, {}),
        ([allowed("c", 10, 5, "rw"), DENY_ALL], False, {}),
        ([denied("b", 8, 0, "rw")], False, {}),  # it was not allowed
        ([ALLOW_ALL], True, {}),
        ([ALLOW_ALL, denied("b", 8, 0, "rw")], True, {("b", 8, 0): "rw"}),
        ([ALLOW_ALL, denied("b", 8, 0, "rw"), allowed("b", 8, None, "r")], True, {("b", 8, 0): "w"}),
        ([ALLOW_ALL, denied("c", 1, 3, "rwm")], True, {}),  # null is allowed for everybody
    ],
)
def test_device_rules_become_a_v1_list(rules: list[DeviceRule], default: bool, exceptions: dict[Any, str]) -> None:
    found = resolve(rules)
    rest = {key: access for key, access in found.exceptions.items() if default or key not in ALWAYS}
    assert (found.default, rest) == (default, {key: frozenset(access) for key, access in exceptions.items()})
    assert default or set(ALWAYS) <= set(found.exceptions)


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ([allowed("b", None, None, "rw"), denied("b", 8, 0, "r")], r"allow b \*:\* and deny b 8:0 of it"),
        ([allowed("c", 10, None, "r"), denied("c", None, 5, "r")], r"allow c 10:\* and deny c \*:5 of it"),
        ([ALLOW_ALL, denied("b", 8, None, "r"), allowed("b", 8, 1, "r")], r"deny b 8:\* and allow b 8:1 of it"),
        ([ALLOW_ALL, denied("c", None, None, "r")], r"deny c \*:\* and allow c 1:3 of it"),
    ],
)
def test_device_rules_that_v1_cannot_express_are_rejected(rules: list[DeviceRule], text: str) -> None:
    """GHSA-g54h-m393-cpwq: the kernel would silently accept the rule, and the device would stay accessible."""
    with pytest.raises(SpecError, match=rf"^linux\.resources\.devices: cgroup v1 cannot {text}$"):
        resolve(rules)


def test_another_access_is_no_hole() -> None:
    found = resolve([allowed("b", None, None, "r"), denied("b", 8, 0, "w")])
    assert found.exceptions["b", None, None] == frozenset("rm")


def test_a_list_changes_in_the_fewest_steps() -> None:
    def of(default: bool, **access: str) -> DeviceList:
        return DeviceList(default, {("c", int(minor[1:]), None): frozenset(text) for minor, text in access.items()})

    allow, deny = "devices.allow", "devices.deny"
    before = of(False, d1="rw", d2="r")
    assert changes(None, before) == [(deny, "a"), (allow, "c 1:* rw"), (allow, "c 2:* r")]
    assert changes(before, before) == []
    assert changes(before, of(False, d1="r", d3="m")) == [(deny, "c 1:* w"), (deny, "c 2:* r"), (allow, "c 3:* m")]
    assert changes(before, of(True, d1="w")) == [(allow, "a"), (deny, "c 1:* w")]
    assert changes(of(True, d1="w"), of(True, d2="r")) == [(deny, "c 2:* r"), (allow, "c 1:* w")]


def values(document: dict[str, Any], **now: str) -> list[tuple[str, str]]:
    found = settings(Resources.from_json(document), lambda file: now.get(file.replace(".", "_")))
    return [(setting.file.partition(".")[2], setting.value) for setting in found]


@pytest.mark.parametrize(
    ("limit", "swap", "now", "order"),
    [
        (10, 20, 1 << 62, ["limit_in_bytes", "memsw.limit_in_bytes"]),  # new: both are unlimited
        (30, 40, 20, ["memsw.limit_in_bytes", "limit_in_bytes"]),
        (10, 15, 20, ["limit_in_bytes", "memsw.limit_in_bytes"]),
        (-1, -1, 20, ["memsw.limit_in_bytes", "limit_in_bytes"]),
        (-1, 0, 20, ["memsw.limit_in_bytes", "limit_in_bytes"]),
        (10, 0, 20, ["limit_in_bytes"]),
    ],
)
def test_memory_and_swap_are_never_below_memory(limit: int, swap: int, now: int, order: list[str]) -> None:
    document = {"memory": {"limit": limit, "swap": swap}}
    assert [file for file, _ in values(document, memory_memsw_limit_in_bytes=str(now))] == order


@pytest.mark.parametrize(
    ("quota", "period", "now", "order"),
    [
        (5000, 10000, (-1, 100000), ["cfs_period_us", "cfs_quota_us"]),
        (500000, 1000000, (-1, 100000), ["cfs_period_us", "cfs_quota_us"]),
        (5000, 10000, (50000, 100000), ["cfs_quota_us", "cfs_period_us"]),
        (80000, 100000, (5000, 10000), ["cfs_period_us", "cfs_quota_us"]),
        (-1, 20000, (5000, 10000), ["cfs_period_us", "cfs_quota_us"]),
        (0, 20000, (5000, 10000), ["cfs_period_us"]),
    ],
)
def test_quota_and_period_do_not_pass_through_more(
    quota: int, period: int, now: tuple[int, int], order: list[str]
) -> None:
    before = {f"cpu_cfs_{name}_us": str(value) for name, value in zip(("quota", "period"), now, strict=True)}
    assert [file for file, _ in values({"cpu": {"quota": quota, "period": period}}, **before)] == order


def test_settings() -> None:
    document = {
        "memory": {"kernel": 5, "kernelTCP": -1, "swappiness": 30, "disableOOMKiller": True, "reservation": 4},
        "cpu": {"shares": 300000, "idle": 0, "realtimeRuntime": 10, "realtimePeriod": 20},
        "blockIO": {
            "weight": 10,
            "weightDevice": [{"major": 8, "minor": 0, "weight": 20}],
            "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 0}],
        },
        "hugepageLimits": [{"pageSize": "1GB", "limit": 0}],
        "network": {"classID": 7, "priorities": [{"name": "lo", "priority": 2}]},
        "rdma": {"mlx": {"hcaObjects": 3}},
        "pids": {"limit": -1},
    }
    assert values(document, cpu_rt_period_us="10") == [
        ("soft_limit_in_bytes", "4"), ("kmem.limit_in_bytes", "5"), ("kmem.tcp.limit_in_bytes", "-1"),
        ("swappiness", "30"), ("oom_control", "1"), ("idle", "0"), ("shares", "262144"), ("rt_period_us", "20"),
        ("rt_runtime_us", "10"), ("max", "max"), ("bfq.weight", "10"), ("bfq.weight_device", "8:0 20"),
        ("throttle.write_iops_device", "8:0 0"), ("1GB.limit_in_bytes", "0"), ("1GB.rsvd.limit_in_bytes", "0"),
        ("classid", "7"), ("ifpriomap", "lo 2"), ("max", "mlx hca_object=3"),
    ]  # fmt: skip


def write(directory: Path, contents: dict[str, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (directory / name).write_text(text)


def test_a_new_cpuset_has_what_the_one_above_has(tmp_path: Path) -> None:
    write(tmp_path, {"cpuset.cpus": "0-3\n", "cpuset.mems": "0\n"})
    write(tmp_path / "new", {"cpuset.cpus": "\n", "cpuset.mems": "1\n"})
    fill_cpuset(str(tmp_path), str(tmp_path / "new"))
    assert [(tmp_path / "new" / name).read_text().strip() for name in ("cpuset.cpus", "cpuset.mems")] == ["0-3", "1"]
    (tmp_path / "bare").mkdir()
    fill_cpuset(str(tmp_path), str(tmp_path / "bare"))  # a kernel without the v1 files


def test_those_above_are_widened_as_far_as_needed(tmp_path: Path) -> None:
    for path, cpus in ((".", "0-7"), ("a", "0-7"), ("a/b", "0-1"), ("a/b/c", "0")):
        write(tmp_path / path, {"cpuset.cpus": cpus})
    assert chain(str(tmp_path), f"{tmp_path}/a/b/c") == [f"{tmp_path}/a", f"{tmp_path}/a/b"]
    widen_cpuset(str(tmp_path), f"{tmp_path}/a/b/c", "cpuset.cpus", "1")
    assert (tmp_path / "a/b/cpuset.cpus").read_text() == "0-1"
    widen_cpuset(str(tmp_path), f"{tmp_path}/a/b/c", "cpuset.cpus", "2-3")
    assert [(tmp_path / path / "cpuset.cpus").read_text() for path in ("a", "a/b", "a/b/c")] == ["0-7", "0-7", "0"]


def test_those_above_have_the_real_time_of_all_in_them(tmp_path: Path) -> None:
    for path, runtime, period in (("a", 0, 1000000), ("a/b", 0, 1000000), ("a/b/c", 0, 500000), ("a/b/d", 9, 1000)):
        write(tmp_path / path, {"cpu.rt_runtime_us": str(runtime), "cpu.rt_period_us": str(period)})
    raise_realtime(str(tmp_path), f"{tmp_path}/a/b/c", 1000, None)
    assert [(tmp_path / path / "cpu.rt_runtime_us").read_text() for path in ("a", "a/b")] == ["11000", "11000"]
    raise_realtime(str(tmp_path), f"{tmp_path}/a/b/c", 500, None)
    assert (tmp_path / "a/cpu.rt_runtime_us").read_text() == "11000"


V1 = {
    "cpuacct.usage": "77\n",
    "cpuacct.usage_percpu": "70 7 \n",
    "cpuacct.usage_user": "50\n",
    "cpuacct.usage_sys": "27\n",
    "cpu.stat": "nr_periods 5\nnr_throttled 4\nthrottled_time 3\n",
    "memory.usage_in_bytes": "10\n",
    "memory.max_usage_in_bytes": "20\n",
    "memory.failcnt": "3\n",
    "memory.limit_in_bytes": "9223372036854771712\n",
    "memory.memsw.usage_in_bytes": "12\n",
    "memory.kmem.usage_in_bytes": "4\n",
    "memory.use_hierarchy": "1\n",
    "memory.stat": "cache 6\nrss 4\n",
    "pids.current": "2\n",
    "pids.max": "9\n",
    "blkio.bfq.io_service_bytes_recursive": "",
    "blkio.throttle.io_service_bytes_recursive": "8:0 Read 5\n8:0 Write 6\n8:0 Total 11\nTotal 11\n",
    "blkio.throttle.io_serviced": "8:0 Read 1\n",
    "blkio.bfq.time_recursive": "8:0 99\n",
    "hugetlb.2MB.usage_in_bytes": "4\n",
    "hugetlb.2MB.max_usage_in_bytes": "5\n",
    "hugetlb.2MB.failcnt": "6\n",
    "hugetlb.2MB.rsvd.usage_in_bytes": "0\n",
}


def test_stats(tmp_path: Path) -> None:
    write(tmp_path, V1)
    controllers = ("cpu", "cpuacct", "memory", "pids", "blkio", "hugetlb")
    stats = v1_stats.read(dict.fromkeys(controllers, str(tmp_path)), lambda: 99)
    cpu = stats.cpu_stats.cpu_usage
    assert (cpu.total_usage, cpu.percpu_usage, cpu.usage_in_usermode, cpu.usage_in_kernelmode) == (77, (70, 7), 50, 27)
    assert stats.cpu_stats.throttling_data.throttled_time == 3
    memory = stats.memory_stats
    assert memory.usage == MemoryData(10, 20, 3, 9223372036854771712)
    assert (memory.swap_usage.usage, memory.kernel_usage.usage, memory.cache, memory.use_hierarchy) == (12, 4, 6, True)
    assert memory.stats == {"cache": 6, "rss": 4}
    assert (stats.pids_stats.current, stats.pids_stats.limit) == (2, 9)
    assert stats.blkio_stats.io_service_bytes_recursive == (
        BlkioEntry(8, 0, "Read", 5), BlkioEntry(8, 0, "Write", 6), BlkioEntry(8, 0, "Total", 11),
    )  # fmt: skip
    assert stats.blkio_stats.io_serviced_recursive == (BlkioEntry(8, 0, "Read", 1),)
    assert stats.blkio_stats.io_time_recursive == (BlkioEntry(8, 0, "", 99),)
    assert stats.hugetlb_stats == {"2MB": HugetlbStats(4, 5, 6)}


def test_ticks_where_the_kernel_counts_no_nanoseconds_of_modes(tmp_path: Path) -> None:
    write(tmp_path, {"cpuacct.stat": "user 3\nsystem 4\n"})
    usage = v1_stats.read({"cpuacct": str(tmp_path)}, lambda: 0).cpu_stats.cpu_usage
    assert (usage.usage_in_usermode, usage.usage_in_kernelmode) == (30_000_000, 40_000_000)


def test_without_controllers_all_is_zero() -> None:
    stats = v1_stats.read({}, lambda: 3)
    assert stats.pids_stats.current == 3
    assert stats.but(pids_stats=CgroupStats().pids_stats, hugetlb_stats={}) == CgroupStats(hugetlb_stats={})
    assert UNLIMITED == (1 << 64) - 1


MOUNT = Mount("/sys/fs/cgroup", "cgroup", "cgroup", ("ro", "nosuid", "rprivate"))
PATHS = {"cpu,cpuacct": "/sys/fs/cgroup/cpu,cpuacct/x", "memory": "/sys/fs/cgroup/memory/x"}


def _expand(
    mount: Mount, paths: dict[str, str], *, namespace: bool
) -> tuple[list[PlannedMount], list[tuple[str, str]]]:
    return expand_cgroups(plan_mount(mount, "mounts[0]"), paths, namespace=namespace)


def test_a_mount_of_v1_is_one_for_each_hierarchy_and_links() -> None:
    own = plan_mount(MOUNT, "").options
    mounts, links = _expand(MOUNT, PATHS, namespace=True)
    assert [(mount.target, mount.type, mount.options) for mount in mounts] == [
        ("/sys/fs/cgroup", "tmpfs", own.but(data=("mode=755", "size=64k"))),
        ("/sys/fs/cgroup/cpu,cpuacct", "cgroup", own.but(propagation=0, data=("cpu", "cpuacct"))),
        ("/sys/fs/cgroup/memory", "cgroup", own.but(propagation=0, data=("memory",))),
    ]
    assert links == [("cpu,cpuacct", "/sys/fs/cgroup/cpu"), ("cpu,cpuacct", "/sys/fs/cgroup/cpuacct")]
    mounts, _ = _expand(MOUNT, PATHS, namespace=False)
    assert [(mount.type, mount.source, mount.options) for mount in mounts[1:]] == [
        ("bind", path, own.but(propagation=0, bind=True)) for path in PATHS.values()
    ]


def test_a_mount_of_v2_is_one() -> None:
    own = plan_mount(MOUNT, "").options
    (mount,), links = _expand(MOUNT, {"": "/c"}, namespace=True)
    assert (mount.type, mount.options, links) == ("cgroup2", own, [])
    (mount,), _ = _expand(MOUNT, {"": "/c"}, namespace=False)
    assert (mount.type, mount.source, mount.options) == ("bind", "/c", own.but(bind=True))


@pytest.mark.parametrize(
    ("mount", "paths", "text"),
    [
        (MOUNT.but(options=("memory",)), PATHS, "mounts[0].options: 'memory' is not an option"),
        (MOUNT.but(type="cgroup2"), PATHS, "mounts[0].type: the cgroups of this machine are of version 1"),
        (MOUNT, {}, "mounts[0]: a cgroup mount needs a cgroup namespace or a cgroup"),
    ],
)
def test_mounts_that_cannot_be(mount: Mount, paths: dict[str, str], text: str) -> None:
    with pytest.raises(SpecError) as caught:
        _expand(mount, paths, namespace=False)
    assert str(caught.value).startswith(text)

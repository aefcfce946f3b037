"""Test systemd scopes: their cgroups, and limits as unit properties."""

from __future__ import annotations

import pytest

from caisson.agent.libcontainer.cgroups import systemd_properties
from caisson.agent.libcontainer.cgroups.base import CgroupError, Setting
from caisson.agent.libcontainer.cgroups.systemd import Scope, properties, start_command


@pytest.fixture(autouse=True)
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("system.slice:docker:4f", "/system.slice/docker-4f.scope"),
        ("machine-a-b.slice:libpod:4f", "/machine.slice/machine-a.slice/machine-a-b.slice/libpod-4f.scope"),
        (":runc:box", "/system.slice/runc-box.scope"),
        ("-.slice::box", "/box.scope"),
    ],
)
def test_a_scope_is_where_its_slices_say(text: str, path: str) -> None:
    assert Scope(text).path == path


def test_a_scope_of_an_ordinary_user_is_below_the_users_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert Scope(":runc:box").path == "/user.slice/user-1000.slice/user@1000.service/user.slice/runc-box.scope"


@pytest.mark.parametrize(
    "text", ["/a/b", "a:b", "a.slice:b:", "a:b:c", "../x.slice:b:c", "a.slice:b:c/d", "a.slice:b:c d"]
)
def test_scope_rejects_what_is_not_slice_prefix_name(text: str) -> None:
    with pytest.raises(CgroupError, match="systemd"):
        Scope(text)


def test_limits_are_properties_of_the_unit() -> None:
    files = {
        "memory.max": "1048576", "memory.swap.max": "max", "cpu.weight": "39", "cpu.max": "25000 50000",
        "pids.max": "7", "cpuset.cpus": "0-1", "io.weight": "default 50", "hugetlb.2MB.max": "0",
    }  # fmt: skip
    assert properties(Setting("linux", file, value) for file, value in files.items()) == [
        "MemoryMax=1048576", "MemorySwapMax=infinity", "CPUWeight=39", "CPUQuota=50.00%", "CPUQuotaPeriodSec=50000us",
        "TasksMax=7", "AllowedCPUs=0-1", "IOWeight=50",
    ]  # fmt: skip
    assert properties([Setting("linux", "cpu.max", "max 100000"), Setting("linux", "cpu.idle", "1")]) == [
        "CPUQuota=", "CPUQuotaPeriodSec=100000us", "CPUWeight=idle",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "assignment"),
    [
        ("TimeoutStopUSec", "uint64 123456789", "TimeoutStopSec=123456789us"),
        ("TimeoutStopSec", "456", "TimeoutStopSec=456000000us"),
        ("TimeoutStopSec", "byte 234", "TimeoutStopSec=234000000us"),
        ("TimeoutStopSec", "@t 234", "TimeoutStopSec=234000000us"),
        ("TimeoutStopSec", "234.789", "TimeoutStopSec=234789000us"),
        ("RuntimeMaxUSec", "uint64 0xffffffffffffffff", "RuntimeMaxSec=infinity"),
        ("CPUQuotaPerSecUSec", "uint64 500000", "CPUQuota=50%"),
        ("FOOSec", "123", "FOOSec=123"),
        ("Sec", "123", "Sec=123"),
        ("TasksMax", "uint64 010", "TasksMax=8"),
        ("CollectMode", "'inactive-or-failed'", "CollectMode=inactive-or-failed"),
        ("Description", '"a \\"box\\""', 'Description=a "box"'),
        ("SendSIGHUP", "true", "SendSIGHUP=yes"),
        ("SendSIGHUP", "boolean false", "SendSIGHUP=no"),
        ("After", "['a.service', \"b.service\"]", "After=a.service b.service"),
        ("After", "@as []", "After="),
    ],
)
def test_annotations_are_properties_of_the_unit(name: str, value: str, assignment: str) -> None:
    annotations = {f"org.systemd.property.{name}": value, "some.other": "0"}
    assert systemd_properties.properties(annotations) == [assignment]
    assert f"--property={assignment}" in start_command(Scope(":runc:box"), [assignment])


@pytest.mark.parametrize("name", ["", "xx", "A name", "3335", "Name1", "Кир", "a=b"])
def test_names_that_no_property_has(name: str) -> None:
    with pytest.raises(CgroupError, match=r"name incorrect: (too short|contains non-alphabetic character)$"):
        systemd_properties.properties({f"org.systemd.property.{name}": "1"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TimeoutStopSec", "false"), ("TimeoutStopSec", "'covfefe'"), ("TasksMax", "byte 256"),
        ("TasksMax", "uint64 -1"),
        ("TasksMax", "3000000000"), ("TasksMax", "1 2"), ("TasksMax", ""), ("TasksMax", "[1]"), ("TasksMax", "nope 1"),
        ("TasksMax", "uint64 1.5"), ("CollectMode", "'open"), ("CollectMode", "string 1"), ("CollectMode", "inactive"),
        ("After", "['a',]"), ("After", "['a' 'b']"), ("After", "[['a']]"), ("TasksMax", "uint64 09"),
    ],
)  # fmt: skip
def test_values_that_are_none_of_a_property(name: str, value: str) -> None:
    key = f"org.systemd.property.{name}"
    with pytest.raises(CgroupError, match=rf"^annotation {key}=.* value parse error: "):
        systemd_properties.properties({key: value})

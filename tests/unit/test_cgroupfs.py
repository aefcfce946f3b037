"""Test which cgroup v1 hierarchies a guest gets."""

from __future__ import annotations

import pytest

from caisson.agent.base import syscalls
from caisson.agent.guest.cgroupfs import hierarchies, mount_v2

PROC_CGROUPS = """\
#subsys_name\thierarchy\tnum_cgroups\tenabled
cpuset\t0\t1\t1
cpu\t0\t1\t1
cpuacct\t0\t1\t1
memory\t0\t1\t0
net_prio\t0\t1\t1
pids\t0\t1\t1
"""


def test_controllers_that_belong_together_share_a_hierarchy() -> None:
    assert hierarchies(PROC_CGROUPS.splitlines(keepends=True)) == [
        ("cpu", "cpuacct"), ("cpuset",), ("net_prio",), ("pids",),
    ]  # fmt: skip


def test_an_older_kernel_is_not_asked_for_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
        asked.append(data)
        raise OSError(22, "Invalid argument", target)

    monkeypatch.setattr(syscalls, "mount", mount)
    with pytest.raises(OSError, match="Invalid argument"):
        mount_v2()
    assert asked == ["nsdelegate,favordynmods", "nsdelegate"]

"""Test process fields other than privileges and limits, in real containers: the first process and others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.libcontainer.config.process import Process
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.errors import LaunchError
from tests.native.nsexec_support import Box, config

pytestmark = pytest.mark.root

IOPRIO_GET, IOPRIO_WHO_PROCESS = {"x86_64": 252, "aarch64": 31}[os.uname().machine], 1
STAT_NICE, STAT_POLICY = 18, 40  # fields of /proc/PID/stat, proc(5)


def stat(pid: int) -> list[str]:
    return ["", "", "", *Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()]


def io_priority(pid: int) -> int:
    import ctypes

    return int(ctypes.CDLL(None).syscall(IOPRIO_GET, IOPRIO_WHO_PROCESS, pid))


async def both(box: Box, value: dict[str, Any], process: dict[str, Any] | None = None) -> tuple[int, int]:
    """Return the pids of a container's init process and of another one."""
    value["process"]["args"] = ["sleep", "1000"]
    init = await box.running(value)
    null = os.open("/dev/null", os.O_RDWR)
    try:
        from caisson.agent.libcontainer.process.launch import Stdio

        other = await box.launch_exec(
            Process.from_json({"args": ["sleep", "1000"], "env": ["PATH=/bin"], **(process or {})}),
            init,
            Spec.from_json(value),
            Stdio(null, null, null),
        )
    finally:
        os.close(null)
    return init.child.pid, other.child.pid


@pytest.mark.parametrize(
    "scheduler, policy, nice",
    [
        ({"policy": "SCHED_BATCH", "nice": 7}, 3, 7),
        ({"policy": "SCHED_IDLE"}, 5, 0),
        ({"policy": "SCHED_OTHER", "nice": 19, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}, 0, 19),
    ],
)
async def test_scheduler(box: Box, scheduler: dict[str, Any], policy: int, nice: int) -> None:
    for pid in await both(box, config(scheduler=scheduler)):
        fields = stat(pid)
        assert int(fields[STAT_POLICY + 1]) == policy
        assert policy == 5 or int(fields[STAT_NICE + 1]) == nice


@pytest.mark.parametrize(
    "scheduler",
    [
        {"policy": "SCHED_BATCH", "flags": ["SCHED_FLAG_RESET_ON_FORK"], "nice": 3},
        {"policy": "SCHED_DEADLINE", "runtime": 42000, "deadline": 100_000, "period": 1_000_000},
        {"policy": "SCHED_DEADLINE", "flags": ["SCHED_FLAG_RESET_ON_FORK"], "runtime": 42000, "deadline": 1_000_000},
    ],
    ids=["reset", "deadline", "deadline-reset"],
)
async def test_a_scheduler_that_a_clone_would_lose(box: Box, scheduler: dict[str, Any]) -> None:
    """An exec is cloned into the pid namespace after everything else; only root may set deadlines."""
    policy = {"SCHED_BATCH": 3, "SCHED_DEADLINE": 6}[scheduler["policy"]]
    reset = os.SCHED_RESET_ON_FORK if "flags" in scheduler else 0

    pids = await both(box, config(scheduler=scheduler), {"scheduler": scheduler})

    assert [os.sched_getscheduler(pid) for pid in pids] == [policy | reset] * 2


def test_a_real_time_scheduler(box: Box) -> None:
    """If the machine permits it (a v1 cgroup may have no runtime budget, and fail with EPERM)."""

    async def work() -> None:
        try:
            pids = await both(box, config(scheduler={"policy": "SCHED_RR", "priority": 3}))
        except LaunchError as error:
            assert str(error) == "scheduler: operation not permitted"
            return
        assert all(int(stat(pid)[STAT_POLICY + 1]) == 2 for pid in pids)

    box.run(work())


@pytest.mark.parametrize(
    "wanted, value",
    [(("IOPRIO_CLASS_BE", 6), 2 << 13 | 6), (("IOPRIO_CLASS_IDLE", 0), 3 << 13), (("IOPRIO_CLASS_BE", 0), 2 << 13)],
)
async def test_io_priority(box: Box, wanted: tuple[str, int], value: int) -> None:
    for pid in await both(box, config(ioPriority={"class": wanted[0], "priority": wanted[1]})):
        assert io_priority(pid) == value


async def test_personality(box: Box) -> None:
    value = config()
    value["linux"]["personality"] = {"domain": "LINUX32"}

    for pid in await both(box, value):
        assert Path(f"/proc/{pid}/personality").read_text().strip().endswith("8")


async def test_the_agents_cpus_are_not_the_containers(box: Box) -> None:
    cpus = os.sched_getaffinity(0)
    assert len(cpus) > 1, "this machine has one CPU: it cannot tell"

    os.sched_setaffinity(0, {min(cpus)})
    try:
        pids = await both(box, config())
    finally:
        os.sched_setaffinity(0, cpus)
    for pid in pids:
        assert os.sched_getaffinity(pid) == cpus


@pytest.mark.parametrize(
    "initial, final, result", [("0", "1", {1}), ("0", "", None), ("", "0", {0}), ("0-1", "0,1", {0, 1})]
)
async def test_cpus_of_an_exec(box: Box, initial: str, final: str, result: set[int] | None) -> None:
    wanted = {key: text for key, text in (("initial", initial), ("final", final)) if text}

    first, other = await both(box, config(), {"execCPUAffinity": wanted})
    assert os.sched_getaffinity(other) == (result or os.sched_getaffinity(0))
    assert os.sched_getaffinity(first) == os.sched_getaffinity(0)


async def test_cpus_that_are_not_there(box: Box) -> None:
    with pytest.raises(LaunchError, match="cpu affinity: none of these CPUs is available"):
        await both(box, config(), {"execCPUAffinity": {"initial": "8000"}})


def test_a_name_of_a_user(box: Box) -> None:
    (box.rootfs / "etc").mkdir(exist_ok=True)
    (box.rootfs / "etc/passwd").write_text("app:x:1000:100::/srv:/bin/sh\n")
    (box.rootfs / "etc/group").write_text("users:x:100:\naudio:x:29:app\n")
    script = ["sh", "-c", "id -u; id -g; id -G; echo $HOME"]
    value = config(*script, user={"username": "app"})
    assert box.run(box.output(value)) == (0, "1000\n100\n100 29\n/srv\n", "")

    async def work() -> tuple[int, str, str]:
        init = await box.running()
        return await box.exec(init, {"args": script, "user": {"username": "app:audio"}})

    assert box.run(work()) == (0, "1000\n29\n29\n/srv\n", "")
    with pytest.raises(SpecError, match="unable to find user none"):
        box.run(box.output(config(user={"username": "none"})))


def test_labels_that_this_kernel_cannot_give(box: Box) -> None:
    from caisson.agent.libcontainer.plan.lsm import has_apparmor, has_selinux

    for field, module, there in (
        ("apparmorProfile", "AppArmor", has_apparmor()),
        ("selinuxLabel", "SELinux", has_selinux()),
    ):
        if not there:
            with pytest.raises(SpecError, match=f"process.{field}: this kernel has no {module}"):
                Spec.from_json(config(**{field: "x"}))

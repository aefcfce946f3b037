"""Test a container's side of the host: cgroups, processes, and what remains when one of them ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from pathlib import Path

import pytest

from caisson.agent.libcontainer import cgroups
from caisson.agent.shim.bundle import TaskBundle
from caisson.proto.containerd import runc_options_pb2, tasks_pb2
from tests.shim.fake_containerd import FakeContainerd, limits
from tests.shim.native_machines import agent_of
from tests.support.poll import until
from tests.support.unique import unique

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

SLEEP = ("sleep", "1000")


@pytest.mark.parametrize("killed", [False, True])
async def test_the_hosts_side_has_the_containers_cgroup_and_cpus(fake: FakeContainerd, killed: bool) -> None:
    parent = unique("caisson-shim")
    linux = fake.spec()["linux"] | {"cgroupsPath": f"/{parent}/c1", "resources": {"cpu": {"shares": 77}}}
    task = await fake.run("c1", *SLEEP, linux=linux)
    shim = (await task.call("Connect")).shim_pid
    for pid in (shim, agent_of(next(fake.place.glob("agents/*"))).pid):
        assert all(line.endswith(f"/{parent}/c1") for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    await task.call("Update", resources=limits(b'{"cpu": {"cpus": "0"}}'))
    assert "Cpus_allowed_list:\t0\n" in Path(f"/proc/{shim}/status").read_text()
    if killed:
        os.kill(shim, signal.SIGKILL)
        Path(task.address.removeprefix("unix://")).unlink()
    else:
        await task.end()
    await fake.delete_program(task)
    for hierarchy in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()):
        assert not (hierarchy / parent / "c1").exists(), hierarchy
        if (hierarchy / parent).is_dir():  # created by containerd's client, or a kubelet
            (hierarchy / parent).rmdir()


async def test_a_cgroup_whose_limits_cannot_be_set_is_removed(fake: FakeContainerd) -> None:
    hierarchy, parent = cgroups.of_host(), unique("caisson-shim")
    assert hierarchy is not None
    linux = fake.spec()["linux"] | {"cgroupsPath": f"/{parent}", "resources": {"cpu": {"cpus": "4000"}}}
    task = await fake.start("c1", *SLEEP, linux=linux)
    shim = (await task.call("Connect")).shim_pid
    assert "cpuset.cpus" in (await task.refused("Create", bundle=str(task.bundle)))[1]
    assert parent not in Path(f"/proc/{shim}/cgroup").read_text()
    await task.call("Shutdown")
    await fake.delete_program(task)
    left = [directory for directory in map(Path, hierarchy.place(f"/{parent}").values()) if directory.exists()]
    for directory in left:
        directory.rmdir()
    assert left == []


async def test_the_shim_alone_is_in_the_cgroup_of_its_options(fake: FakeContainerd) -> None:
    hierarchy = cgroups.of_host()
    assert hierarchy is not None
    name, parent = unique("caisson-own"), unique("caisson-shim")
    own = hierarchy.create(f"/{name}")
    linux = fake.spec()["linux"] | {"cgroupsPath": f"/{parent}/c1"}
    task = await fake.start("c1", *SLEEP, linux=linux)
    options = runc_options_pb2.Options(shim_cgroup=f"/{name}").SerializeToString()
    await task.create(options={"type_url": "containerd.runc.v1.Options", "value": options})
    shim = (await task.call("Connect")).shim_pid
    assert f"/{name}\n" in Path(f"/proc/{shim}/cgroup").read_text()
    guest = agent_of(next(fake.place.glob("agents/*"))).pid
    assert all(line.endswith(f"/{parent}/c1") for line in Path(f"/proc/{guest}/cgroup").read_text().splitlines())
    ended = os.pidfd_open(shim)
    await task.end()
    await until(lambda: select.select([ended], [], [], 0)[0], "the shim has ended, and given up the pod's cgroup")
    os.close(ended)
    await own.delete()
    for directory in map(Path, hierarchy.place(f"/{parent}").values()):
        with contextlib.suppress(FileNotFoundError):  # the shim has removed it
            directory.rmdir()


async def test_the_kernel_kills_a_shim_before_containerd(fake: FakeContainerd) -> None:
    task = await fake.start("c1", *SLEEP)
    shim = (await task.call("Connect")).shim_pid
    ours, its = (int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (os.getpid(), shim))
    assert its == min(ours + 1, 1000)
    await task.call("Shutdown")


async def test_the_process_on_the_host_has_ended_when_the_containers_end_is_told(fake: FakeContainerd) -> None:
    task = await fake.start("c1", "true")
    pid = (await task.create()).pid
    waiting = asyncio.ensure_future(task.call("Wait"))
    await task.call("Start")
    await waiting
    assert not Path(f"/proc/{pid}").exists()
    await task.call("Delete")
    await task.call("Shutdown")


async def test_after_a_killed_shim_delete_works_from_the_bundle(fake: FakeContainerd) -> None:
    task = await fake.run("c1", *SLEEP)
    record = TaskBundle(task.bundle, "c1").read()
    assert record is not None
    processes = (record.holder, agent_of(next(fake.place.glob("agents/*"))))
    assert [one.alive for one in processes] == [True, True]
    os.kill(record.shim.pid, signal.SIGKILL)
    assert (await fake.delete_program(task)).exit_status == 137
    assert [one.alive for one in processes] == [False, False]
    Path(task.address.removeprefix("unix://")).unlink()  # a stale socket is taken over at the next start


async def test_a_guest_that_has_ended_ends_its_containers(fake: FakeContainerd) -> None:
    task = await fake.run("c1", *SLEEP)
    await task.exec("e1", *SLEEP)
    os.kill(agent_of(next(fake.place.glob("agents/*"))).pid, signal.SIGTERM)
    assert (await task.call("Wait")).exit_status == 137
    await fake.until(lambda: "exit" in fake.topics("c1"))
    assert fake.topics("c1")[-2:] == ["exit e1", "exit"]
    assert (await task.call("State")).status == tasks_pb2.STOPPED
    await task.call("Delete")
    await task.call("Shutdown")


@pytest.mark.parametrize("method", ["Kill", "Delete"])
async def test_a_created_container_ends_with_its_guest(fake: FakeContainerd, method: str) -> None:
    task = await fake.start("c1", *SLEEP)
    await task.create()
    agent = agent_of(next(fake.place.glob("agents/*")))
    os.kill(agent.pid, signal.SIGTERM)
    await until(lambda: not agent.alive, "the guest's end")
    if method == "Kill":
        await task.call("Kill", signal=signal.SIGKILL)
        assert (await task.call("Wait")).exit_status == 137
    await task.call("Delete")
    await task.call("Shutdown")
    assert fake.topics("c1")[-2:] == ["exit", "delete"]

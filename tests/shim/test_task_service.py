"""Call every method of containerd's Task service as containerd does, on a shim whose guest is this host."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.client import Client
from caisson.agent.rpc.ttrpc.responses import RpcError
from caisson.agent.shim.bundle import TaskBundle
from caisson.proto.containerd import metrics_pb2, task_v3_pb2, tasks_pb2
from tests.shim.fake_containerd import FakeContainerd, Task, limits
from tests.support.poll import until

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

CREATED, RUNNING, STOPPED, PAUSED = tasks_pb2.CREATED, tasks_pb2.RUNNING, tasks_pb2.STOPPED, tasks_pb2.PAUSED

SLEEP = ("sleep", "1000")


async def status(task: Task, exec_id: str = "") -> Any:
    return (await task.call("State", exec_id=exec_id)).status


async def test_a_container_from_create_to_shutdown(fake: FakeContainerd) -> None:
    task = await fake.start("c1", "sh", "-c", "exit 7")
    created = await task.create()
    assert Path(f"/proc/{created.pid}/ns/net").exists(), "the pid must be a live process on this host"
    assert await status(task) == CREATED
    waiting = [asyncio.ensure_future(task.call("Wait")) for _ in range(3)]
    started = await task.call("Start")
    assert started.pid == created.pid
    ended = [await one for one in waiting]
    assert {one.exit_status for one in ended} == {7} and ended[0].exited_at.seconds
    assert (await task.call("Wait")).exit_status == 7, "Wait must be answered until Delete"
    state = await task.call("State")
    assert (state.status, state.exit_status, state.exited_at) == (STOPPED, 7, ended[0].exited_at)
    deleted = await task.call("Delete")
    assert (deleted.exit_status, deleted.pid, deleted.exited_at) == (7, created.pid, ended[0].exited_at)
    for method in ("State", "Wait", "Start", "Delete", "Pids", "Stats"):
        assert (await task.refused(method))[0] == StatusCode.NOT_FOUND, method
    await task.call("Shutdown")
    await until(lambda: not Path(task.address.removeprefix("unix://")).exists(), "the socket's end")
    assert fake.topics("c1") == ["create", "start", "exit", "delete"]
    assert (await fake.delete_program(task)).exit_status == 137


async def test_clients_reach_a_containers_root_by_its_pid_and_nothing_of_the_host(fake: FakeContainerd) -> None:
    task = await fake.start("c1", *SLEEP)
    pid = (await task.create()).pid
    root = Path(f"/proc/{pid}/root")
    assert {one.name for one in root.iterdir()} == {one.name for one in fake.rootfs.iterdir()}
    assert (root / "bin/busybox").samefile(fake.rootfs / "bin/busybox")
    points = [line.split()[4] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    assert points == ["/"]
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    await task.call("Start")
    await task.end()


async def test_state_follows_a_process(fake: FakeContainerd) -> None:
    task = await fake.run("c1", *SLEEP)
    state = await task.call("State")
    assert (state.id, state.bundle, state.status, state.terminal) == ("c1", str(task.bundle), RUNNING, False)
    await task.call("Pause")
    assert await status(task) == PAUSED
    await task.call("Resume")
    assert await status(task) == RUNNING
    await task.end()
    assert fake.topics("c1") == ["create", "start", "paused", "resumed", "exit", "delete"]


async def test_create_rejects_an_id_in_use_and_checkpoints(fake: FakeContainerd) -> None:
    task = await fake.start("c1", *SLEEP)
    assert (await task.refused("Create", bundle=str(task.bundle), checkpoint="/x"))[0] == StatusCode.UNIMPLEMENTED
    await task.create()
    assert (await task.refused("Create", bundle=str(task.bundle)))[0] == StatusCode.ALREADY_EXISTS
    code, text = await task.refused("Checkpoint", path="/x")
    assert (code, "not implemented" in text) == (StatusCode.UNIMPLEMENTED, True)
    await task.end()


@pytest.mark.parametrize(
    ("args", "text"), [(["nosuch"], "executable file not found"), (["/etc/passwd"], "permission denied")]
)
async def test_what_cannot_be_executed_fails_in_words_that_docker_knows(
    fake: FakeContainerd, args: list[str], text: str
) -> None:
    task = await fake.start("c1", *args)
    with pytest.raises(RpcError, match=text):
        await task.create()
        await task.call("Start")
    if fake.topics("c1"):
        await task.call("Delete")
    assert (await task.refused("State"))[0] == StatusCode.NOT_FOUND
    await task.call("Shutdown")
    await fake.delete_program(task)


async def test_a_hook_may_leave_a_process_behind(fake: FakeContainerd) -> None:
    pid = fake.place / "left"
    script = f"sleep 1000 & echo $! > {pid}"
    task = await fake.start("c1", *SLEEP, hooks={"prestart": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]})
    try:
        await asyncio.wait_for(task.create(), 20)
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    await task.call("Delete")
    await task.call("Shutdown")


async def test_the_vm_starts_before_it_is_asked_for(fake: FakeContainerd) -> None:
    task = await fake.start("c1", *SLEEP)
    await until(lambda: list(fake.place.glob("agents/*/pid")), "a VM before Create")
    record = TaskBundle(task.bundle, "c1").read()
    assert record is not None and record.owner and record.machine, "`delete` could not stop it"
    await task.call("Shutdown")
    await fake.delete_program(task)
    # `delete` waits three seconds for it, which a very busy machine may exceed.
    await until(lambda: not [*fake.place.glob("agents/*/pid"), *fake.place.glob("run-pods/*")], "the end of the VM")
    assert TaskBundle(task.bundle, "c1").read() is None


@pytest.mark.parametrize("unfit", [{"mounts": [{"type": "bind", "source": "/nosuch"}]}, {"mounts": 7}, {"linux": {}}])
async def test_no_vm_starts_for_a_configuration_that_create_rejects(
    fake: FakeContainerd, unfit: dict[str, Any]
) -> None:
    task = await fake.start("c1", *SLEEP, **unfit)
    await task.call("Connect")
    assert not list(fake.place.glob("agents/*")) and TaskBundle(task.bundle, "c1").read() is None
    await task.refused("Create", bundle=str(task.bundle))
    await task.call("Shutdown")


async def test_a_failed_create_leaves_nothing(fake: FakeContainerd) -> None:
    missing = str(fake.place / "none")
    task = await fake.start("c1", *SLEEP, mounts=[{"destination": "/x", "type": "bind", "source": missing}])
    code, text = await task.refused("Create", bundle=str(task.bundle))
    assert missing in text and code != StatusCode.INTERNAL
    assert (await task.refused("Delete"))[0] == StatusCode.NOT_FOUND
    await task.call("Shutdown")
    await fake.delete_program(task)
    assert fake.topics("c1") == []


async def test_a_network_namespace_that_cannot_be_joined_fails_create_and_leaves_nothing(fake: FakeContainerd) -> None:
    """It is joined while the VM starts."""
    own = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    network = {"type": "network", "path": "/run/netns/none"}
    task = await fake.start("c1", *SLEEP, linux={"namespaces": [*own, network]})
    _, text = await task.refused("Create", bundle=str(task.bundle))
    assert "/run/netns/none: cannot be joined" in text
    await task.call("Shutdown")
    await fake.delete_program(task)
    assert not list(fake.place.glob("agents/*/pid")) and not list(fake.place.glob("run-pods/*"))


async def test_delete_rejects_what_runs_and_ends_what_was_only_created(fake: FakeContainerd) -> None:
    task = await fake.run("c1", *SLEEP)
    assert (await task.refused("Delete"))[0] == StatusCode.FAILED_PRECONDITION
    assert (await task.refused("Start"))[0] == StatusCode.FAILED_PRECONDITION
    await task.end()
    task = await fake.start("c2", *SLEEP)
    await task.create()
    waiting = asyncio.ensure_future(task.call("Wait"))
    assert (await task.call("Delete")).exit_status == 137
    assert (await waiting).exit_status == 137
    await task.call("Shutdown")
    await fake.until(lambda: fake.topics("c2") == ["create", "exit", "delete"])


async def test_kill_ends_by_its_signal(fake: FakeContainerd) -> None:
    task = await fake.run("c1", *SLEEP)
    await task.call("Kill", signal=signal.SIGKILL)
    assert (await task.call("Wait")).exit_status == 137
    for fields in ({}, {"all": True}):
        assert await task.refused("Kill", signal=9, **fields) == (StatusCode.NOT_FOUND, "process already finished")
    await task.call("Delete")
    await task.call("Shutdown")


async def test_kill_ends_a_container_that_was_only_created(fake: FakeContainerd) -> None:
    task = await fake.start("c1", *SLEEP)
    await task.create()
    await task.call("Kill", signal=signal.SIGTERM)
    assert (await task.call("Wait")).exit_status == 128 + signal.SIGTERM
    assert await status(task) == STOPPED
    assert (await task.refused("Start"))[0] == StatusCode.FAILED_PRECONDITION
    await task.call("Delete")
    await task.call("Shutdown")


async def test_simultaneous_kills_of_what_was_only_created_publish_one_exit(fake: FakeContainerd) -> None:
    task = await fake.start("c1", *SLEEP)
    await task.create()
    await asyncio.gather(*(task.call("Kill", signal=9) for _ in range(3)), return_exceptions=True)
    assert (await task.call("Wait")).exit_status == 137
    await task.call("Delete")
    await task.call("Shutdown")
    await fake.until(lambda: "delete" in fake.topics("c1"))
    assert fake.topics("c1") == ["create", "exit", "delete"]


async def hang_up(task: Task, method: str, request: Any, milliseconds: int) -> None:
    """Call a method as a client that soon gives up: containerd closes the connection."""
    client = await Client.connect(task.address.removeprefix("unix://"))
    call = asyncio.ensure_future(client.call("containerd.task.v3.Task", method, request.SerializeToString()))
    await asyncio.wait([call], timeout=milliseconds / 1000)
    await client.close()
    await asyncio.gather(call, return_exceptions=True)


async def test_a_pause_that_nobody_waits_for_is_known(fake: FakeContainerd) -> None:
    task = await fake.run("c1", *SLEEP)
    for milliseconds in range(1, 12):
        await hang_up(task, "Pause", task_v3_pb2.PauseRequest(id="c1"), milliseconds)
        with contextlib.suppress(RpcError):
            await task.call("Pause")
        assert await status(task) == PAUSED
        await task.call("Resume")
    await task.end()


@pytest.mark.parametrize("milliseconds", range(3, 9))
async def test_a_kill_that_nobody_waits_for_is_whole(fake: FakeContainerd, milliseconds: int) -> None:
    task = await fake.start("c1", *SLEEP)
    await task.create()
    await hang_up(task, "Kill", task_v3_pb2.KillRequest(id="c1", signal=9), milliseconds)
    with contextlib.suppress(RpcError):
        await task.call("Kill", signal=9)
    async with asyncio.timeout(10):
        assert (await task.call("Wait")).exit_status == 137
    await task.call("Delete")
    await task.call("Shutdown")


async def test_exec_from_exec_to_delete(fake: FakeContainerd) -> None:
    task = await fake.run("c1", *SLEEP)
    for _ in range(2):  # ids are reused at once
        await task.add("e1", "sh", "-c", "exit 3")
        assert await status(task, "e1") == CREATED
        assert (await task.refused("Exec", exec_id="e1", spec={}))[0] == StatusCode.ALREADY_EXISTS
        await task.call("Start", exec_id="e1")
        assert (await task.call("Wait", exec_id="e1")).exit_status == 3
        assert (await task.refused("Kill", exec_id="e1", signal=9)) == (
            StatusCode.NOT_FOUND,
            "process already finished",
        )
        assert (await task.call("Delete", exec_id="e1")).exit_status == 3
        assert (await task.refused("State", exec_id="e1"))[0] == StatusCode.NOT_FOUND
    await task.end()
    of_exec = ["exec-added e1", "exec-started e1", "exit e1"]
    assert fake.topics("c1") == ["create", "start", *of_exec, *of_exec, "exit", "delete"]


async def test_an_exec_that_was_never_started_can_be_deleted(fake: FakeContainerd) -> None:
    task = await fake.run("c1", *SLEEP)
    await task.add("e1", "true")
    await task.call("Delete", exec_id="e1")
    await task.exec("e1", *SLEEP)
    assert (await task.refused("Delete", exec_id="e1"))[0] == StatusCode.FAILED_PRECONDITION
    await task.call("Kill", exec_id="e1", signal=9)
    assert (await task.call("Wait", exec_id="e1")).exit_status == 137
    assert await status(task) == RUNNING
    await task.end()


async def test_an_exec_that_fails_to_start_stays_until_deleted(fake: FakeContainerd) -> None:
    task = await fake.run("c1", *SLEEP)
    await task.add("e1", "nosuch")
    _, text = await task.refused("Start", exec_id="e1")
    assert "executable file not found" in text
    assert await status(task, "e1") == STOPPED
    await task.call("Delete", exec_id="e1")
    await task.end()
    assert "exec-started e1" not in fake.topics("c1")


async def test_the_containers_exit_comes_after_those_of_its_execs(fake: FakeContainerd) -> None:
    task = await fake.run("c1", *SLEEP)
    for number in range(3):
        await task.exec(f"e{number}", *SLEEP)
    await task.call("Kill", signal=9)
    await task.call("Wait")
    await fake.until(lambda: "exit" in fake.topics("c1"))
    ends = [topic for topic in fake.topics("c1") if topic.startswith("exit")]
    assert sorted(ends[:3]) == ["exit e0", "exit e1", "exit e2"] and ends[3:] == ["exit"]
    code, _ = await task.refused("Exec", exec_id="late", spec={"value": b"{}"})
    assert code == StatusCode.FAILED_PRECONDITION
    await task.call("Delete")
    await task.call("Shutdown")


async def test_pids_connect_stats_and_update(fake: FakeContainerd) -> None:
    task = await fake.run("c1", *SLEEP)
    pid = (await task.call("State")).pid
    assert [one.pid for one in (await task.call("Pids")).processes] == [pid]
    connected = await task.call("Connect")
    assert (connected.task_pid, connected.version) == (pid, "v3")
    assert Path(f"/proc/{connected.shim_pid}").exists()
    stats = (await task.call("Stats")).stats
    assert stats.type_url == "io.containerd.cgroups.v2.Metrics"
    metrics = metrics_pb2.Metrics.FromString(stats.value)
    assert metrics.memory.usage > 0 and metrics.pids.current == 1
    assert metrics.HasField("io"), "nerdctl expects it even without entries"
    await task.call(
        "Update", resources=limits(b'{"pids": {"limit": 77}, "memory": {"limit": 33554432}, "devices": []}')
    )
    metrics = metrics_pb2.Metrics.FromString((await task.call("Stats")).stats.value)
    assert (metrics.pids.limit, metrics.memory.usage_limit) == (77, 32 << 20)
    await task.call("Shutdown")  # it stays while a container is left
    assert await status(task) == RUNNING
    await task.end()


async def test_what_is_not_known_is_refused_by_its_kind(fake: FakeContainerd) -> None:
    task = await fake.run("c1", *SLEEP)
    for method in ("State", "Wait", "Kill", "Delete", "Start", "ResizePty", "CloseIO"):
        assert (await task.refused(method, exec_id="other"))[0] == StatusCode.NOT_FOUND, method
        assert (await task.refused(method, id="other"))[0] == StatusCode.NOT_FOUND, method
    for method in ("Pause", "Resume", "Update", "Stats", "Pids", "Exec"):
        assert (await task.refused(method, id="other"))[0] == StatusCode.NOT_FOUND, method
    client = await Client.connect(task.address.removeprefix("unix://"))
    with pytest.raises(RpcError) as error:
        await client.call("containerd.task.v3.Task", "Tomorrow", b"")
    await client.close()
    assert error.value.code == StatusCode.UNIMPLEMENTED
    await task.end()


@pytest.mark.parametrize("version", [2, 3])
async def test_both_versions_of_the_service_are_served(fake: FakeContainerd, version: int) -> None:
    task = await fake.start("c1", "true", version=version)
    await task.create()
    await task.call("Start")
    assert (await task.call("Wait")).exit_status == 0
    await task.call("Delete")
    await task.call("Shutdown")


async def test_containers_of_a_group_have_one_shim_and_one_guest(fake: FakeContainerd) -> None:
    group = {"annotations": {"io.kubernetes.cri.sandbox-id": "p1"}}
    first = await fake.run("p1", *SLEEP, **group)
    second = await fake.run("c2", *SLEEP, **group)
    assert second.address == first.address
    assert len(list(fake.place.glob("agents/*"))) == 1
    await second.call("Kill", signal=9)
    await second.call("Wait")
    await second.call("Delete")
    await second.call("Shutdown")
    await fake.delete_program(second)  # containerd does so after every container: the pod stays
    assert await status(first) == RUNNING
    await first.exec("e1", "true")
    assert (await first.call("Wait", exec_id="e1")).exit_status == 0
    await first.end()

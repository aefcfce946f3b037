"""Test containers in a pid namespace with a pause process, by the launcher: cases that the API cannot cause."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.base.log import Log
from caisson.agent.base.signals import Signals
from caisson.agent.base.syscalls import umount2
from caisson.agent.libcontainer.config.process import Process
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.process.channel import SetupChannel
from caisson.agent.libcontainer.process.launch import Launched, Stdio
from caisson.agent.model.bulk import Bulk
from caisson.agent.model.container import Container
from caisson.agent.model.reaper import Reaper
from tests.native.nsexec_support import Box, children, config
from tests.support.poll import until

pytestmark = pytest.mark.root


@contextlib.asynccontextmanager
async def joined(box: Box) -> AsyncIterator[dict[str, Any]]:
    """Create a pid namespace with a pause process; yield arguments for ProcessLauncher.create."""
    procfs, empty = box.path / "proc", box.path / "empty"
    procfs.mkdir()
    empty.mkdir()
    pause = await box.launcher.pause(str(procfs), str(empty), {})
    try:
        yield {"join": {"pid": f"/proc/{pause.pid}/ns/pid"}, "procfs": str(procfs)}
    finally:
        os.kill(pause.pid, signal.SIGKILL)
        assert await pause.wait() == 137
        umount2(procfs)


def test_with_every_other_namespace(box: Box) -> None:
    """User with maps, time with offsets, cgroup, network: all are created before the pid namespace is entered."""
    kinds = ("pid", "ipc", "uts", "mount", "network", "user", "time", "cgroup")
    value = config("sh", "-c", "id -u; cut -d. -f1 /proc/uptime; cat /proc/1/comm; ip -o link; hostname; echo $$")
    value["linux"]["namespaces"] = [{"type": kind} for kind in kinds]
    value["linux"]["uidMappings"] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    value["linux"]["gidMappings"] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    value["linux"]["timeOffsets"] = {"boottime": {"secs": 1_000_000_000}}

    async def work() -> tuple[int, str, str]:
        async with joined(box) as arguments:
            return await box.output(value, **arguments)

    status, out, err = box.run(work())
    assert (status, err) == (0, "")
    uid, uptime, first, link, host, pid = out.splitlines()
    assert (uid, first, host, pid) == ("0", "pause", "box", "2")
    assert int(uptime) > 1_000_000_000
    assert ": lo: <LOOPBACK,UP" in link


def test_hooks_and_rights(box: Box) -> None:
    """Hooks run inside only if they are the container's own programs; the guest's would be exposed to other members."""
    script = "ulimit -u; umask; id -u; grep -e NoNew -e CapEff /proc/self/status"
    value = config("sh", "-c", script, user={"uid": 7})
    value["process"].update(rlimits=[{"type": "RLIMIT_NPROC", "soft": 3, "hard": 3}], noNewPrivileges=True)
    early = {"path": "/bin/sh", "args": ["sh", "-c", f"cat > {box.path}/early"]}
    value["hooks"] = {"createContainer": [early]}
    (box.rootfs / "tmp").chmod(0o777)

    async def work() -> tuple[int, str, str]:
        async with joined(box) as arguments:
            with pytest.raises(SpecError, match="createContainer: cannot run in a pid namespace with others in it"):
                await box.create(value, **arguments)
            late = {"path": "/bin/sh", "args": ["sh", "-c", "(readlink /proc/self/ns/pid; cat) > /tmp/late"]}
            value["hooks"] = {"prestart": [early], "startContainer": [late]}
            return await box.output(value, **arguments)

    assert box.run(work()) == (0, f"3\n0022\n7\nCapEff:\t{0:016x}\nNoNewPrivs:\t1\n", "")
    assert '"status":"creating","pid":' in (box.path / "early").read_text()
    link, state = (box.rootfs / "tmp" / "late").read_text().split("\n", 1)
    assert link != str(Path("/proc/self/ns/pid").readlink())
    assert '"status":"created","pid":2}' in state


@pytest.mark.parametrize("user", [False, True], ids=["", "user namespace"])
async def test_giving_up_at_any_moment_leaves_nothing(box: Box, user: bool) -> None:
    """A create and an exec that are cancelled: the stages outside end with them, whichever of them is known by then."""
    value = config("sleep", "1000")
    if user:
        value["linux"]["namespaces"].append({"type": "user"})
        for kind in ("uidMappings", "gidMappings"):
            value["linux"][kind] = [{"containerID": 0, "hostID": 100000, "size": 65536}]

    async def gives_up(make: Callable[[], Coroutine[Any, Any, Launched]], left: set[int]) -> None:
        for turns in range(1000):  # turns of the event loop: from before the spawn to the end
            task = asyncio.ensure_future(make())
            for _ in range(turns):
                await asyncio.sleep(0)
            if task.done():
                os.kill(task.result().child.pid, signal.SIGKILL)
                await task.result().child.wait()
                box.fifo.unlink(missing_ok=True)
                return
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not box.fifo.exists()
            await until(lambda: set(children()) == left, "all stages are gone")

    async with joined(box) as arguments:
        pause = set(children())
        await gives_up(lambda: box.create(value, **arguments), pause)
        init = await box.running(value, **arguments)
        null = os.open("/dev/null", os.O_RDWR)

        def execs() -> Coroutine[Any, Any, Launched]:
            return box.launch_exec(
                Process(("sleep", "1000"), env=("PATH=/bin",)), init, Spec.from_json(value), Stdio(null, null, null)
            )

        await gives_up(execs, {*pause, init.child.pid})
        os.close(null)
        os.kill(init.child.pid, signal.SIGKILL)
        await init.child.wait()


async def test_one_that_is_killed_before_its_start(box: Box) -> None:
    async with joined(box) as arguments:
        init = await box.create(config(), **arguments)
        os.kill(init.child.pid, signal.SIGKILL)
        with pytest.raises(LaunchError, match="init"):
            await box.start(init)
        box.fifo.unlink(missing_ok=True)
        init = await box.running(config("sleep", "1000"), **arguments)
        with pytest.raises(LaunchError, match="started before"):
            await box.start(init)
        os.kill(init.child.pid, signal.SIGKILL)
        assert await init.child.wait() == 137


async def test_without_cgroups_what_the_agent_started_ends_with_the_container(box: Box) -> None:
    reaper = Reaper()
    box.launcher.starter.children = reaper
    (box.path / "box").mkdir()
    spec = Spec.from_json(config("sh", "-c", "read x"))
    assert spec.root is not None
    spec = spec.but(root=spec.root.but(path=str(box.rootfs)))
    one = Container(
        "box",
        spec,
        launcher=box.launcher,
        cgroup=None,
        directory=box.path / "box",
        pipe_size=0,
        bulk=Bulk(),
        log=Log("fatal"),
        oom=lambda: None,
    )
    with Signals(box.loop) as signals:
        reaper.start(signals)
        async with joined(box) as arguments:
            await one.create("box", arguments["join"], arguments["procfs"])
            await one.start()
            execs = [await one.exec(f"x{n}", Process(("sleep", "1000"), env=("PATH=/bin",))) for n in range(3)]
            await one.process("").close_stdin()
            assert await one.process("").wait() == 1
            assert [await process.wait() for process in execs] == [137] * 3
            await one.remove()


def test_only_the_makers_of_a_process_say_who_it_is() -> None:
    """A process in a shared namespace may have taken the socket from one that was just created."""

    news: list[tuple[int, int]] = []
    channel = SetupChannel(terminal=False, announced=lambda *pids: news.append(pids), log=lambda *_: None)
    child_end = channel._child_ends[0]
    assert not isinstance(child_end, int)
    line, fd = b'{"stage1_pid":0,"stage2_pid":1}\n', os.pidfd_open(os.getpid())
    with socket.socket(fileno=os.dup(child_end.fileno())) as taken:
        channel.spawned(os.getpid() + 1)  # it was created by someone else
        socket.send_fds(taken, [line], [fd])
        channel.on_readable()
        assert (news, channel.pidfd) == ([], -1)
        channel._makers.add(os.getpid())
        socket.send_fds(taken, [line], [fd])
        channel.on_readable()
        assert news == [(0, 1)] and channel.pidfd >= 0
    os.close(fd)
    channel.close()


def test_who_waits_for_the_end_is_not_woken_before() -> None:
    news: list[tuple[int, int]] = []
    channel = SetupChannel(terminal=False, announced=lambda *pids: news.append(pids), log=lambda *_: None)
    init, sync = (socket.socket(fileno=os.dup(end.fileno())) for end in channel._child_ends[:2])  # type: ignore[union-attr]
    pidfd = os.pidfd_open(os.getpid())
    with init, sync:
        channel.spawned(os.getpid(), until_end=True)
        socket.send_fds(init, [b'{"stage1_pid":0,"stage2_pid":1}\n'], [pidfd])
        sync.send(b'{"type":"procReady"}')
        init.close()
        assert not select.select([channel.fileno()], [], [], 0)[0]
        sync.close()
        assert select.select([channel.fileno()], [], [], 0)[0]
        channel.on_readable()
    assert (news, channel.ready, channel.ended) == ([(0, 1)], True, True)
    os.close(pidfd)
    channel.close()

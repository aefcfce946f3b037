"""The fork server: processes that a resident nsexec creates, its death, and what it keeps."""

from __future__ import annotations

import array
import asyncio
import contextlib
import copy
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.libcontainer.cgroups import HierarchyV2
from caisson.agent.libcontainer.cgroups.base import Cgroup
from caisson.agent.libcontainer.config.process import Process
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.process import init_process
from caisson.agent.libcontainer.process.channel import SetupChannel
from caisson.agent.libcontainer.process.fork_server import ForkServer
from caisson.agent.libcontainer.process.init_process import InitProcess
from caisson.agent.libcontainer.process.launch import Launched
from caisson.agent.libcontainer.process.nsexec import Nsexec
from tests.native.nsexec_support import Box, children, config, make_rootfs
from tests.support.poll import until

pytestmark = pytest.mark.root


class Removed:
    """A cgroup that was removed while it was open."""

    @contextlib.contextmanager
    def join_fds(self) -> Iterator[dict[str, int]]:
        hierarchy = HierarchyV2.find()
        assert hierarchy is not None
        with contextlib.ExitStack() as ends:
            with tempfile.TemporaryDirectory(dir=hierarchy.root, ignore_cleanup_errors=True) as directory:
                fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
                ends.callback(os.close, fd)
                Path(directory).rmdir()
            yield {"_CAISSON_CGROUP": fd}


class Served(Box):
    """A box whose processes a fork server creates."""

    def __init__(self, path: Path, nsexec: Nsexec) -> None:
        super().__init__(path, make_rootfs(path / "rootfs"), nsexec, timeout=1.0)
        self.server = ForkServer(nsexec, self.reaper)
        self.launcher.starter.server = self.server

    async def status(self, init: Launched, *args: str, cgroup: Cgroup | Removed | None = None) -> int:
        """Exec a program without output; return its exit status."""
        with self.stdio() as (stdio, _, _):
            process = Process(args, env=("PATH=/bin",))
            launched = await self.launch_exec(process, init, Spec.from_json(config()), stdio, cgroup)
            return await launched.child.wait()

    async def close(self) -> None:
        self.server.close()
        await until(lambda: set(children()) <= {launched.child.pid for launched in self.created}, "it has exited")
        await super().close()


@pytest.fixture
async def box(sealed: Nsexec) -> AsyncIterator[Served]:
    with tempfile.TemporaryDirectory(prefix="caisson-box-") as directory:
        path = Path(directory)
        path.chmod(0o755)
        served = Served(path, sealed)
        yield served
        await served.close()


@pytest.fixture
async def cgroup() -> AsyncIterator[Cgroup]:
    hierarchy = HierarchyV2.find()
    assert hierarchy is not None
    made = hierarchy.create(f"caisson-served-{os.getpid()}")
    yield made
    await made.kill()
    await made.delete()


def name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


async def test_one_server_creates_all(box: Served, cgroup: Cgroup) -> None:
    init = await box.running(cgroup=cgroup)
    assert await box.status(init, "true", cgroup=cgroup) == 0
    pid = box.server.pid
    assert name(pid) == "nsexec:server"
    with box.stdio() as (stdio, out, _):
        script = "grep ^0: /proc/self/cgroup; ls /proc/self/fd; echo $PPID; exit 7"
        process = Process(("sh", "-c", script), env=("PATH=/bin",))
        launched = await box.launch_exec(process, init, Spec.from_json(config()), stdio, cgroup)
        assert await launched.child.wait() == 7
    place, *descriptors, parent = out.read_text().split()
    assert place.endswith(cgroup.paths[""].rpartition("/")[2])
    assert descriptors == ["0", "1", "2", "3"]  # 3 is that of the directory
    assert parent == "0"  # it is nobody's child in its pid namespace
    results = await asyncio.gather(*(box.status(init, "sh", "-c", f"exit {number}") for number in range(20)))
    assert results == list(range(20))
    assert box.server.pid == pid
    assert len(list(Path(f"/proc/{pid}/fd").iterdir())) == 4  # /dev/null thrice and the socket: nothing of a request


async def test_it_has_the_attributes_of_a_spawned_one(box: Served, cgroup: Cgroup) -> None:
    """Whatever the runtime's signals were when the server was started."""
    init = await box.running(cgroup=cgroup)
    script = (
        "cd /proc/self; umask; cat limits cgroup oom_score_adj timerslack_ns environ; grep -E 'policy|prio' sched;"
        " grep -vE '^(Tgid|Pid|PPid|NS|Vm|Rss|SigQ|.*ctxt)' status; set -- $(cat stat); test $5 = $6 && echo a session"
    )
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN), signal.signal(signal.SIGRTMIN, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    outputs = []
    try:
        for server in (box.server, None):
            box.launcher.starter.server = server
            with box.stdio() as (stdio, out, _):
                process = Process(("sh", "-c", script), env=("PATH=/bin",))
                launched = await box.launch_exec(process, init, Spec.from_json(config()), stdio, cgroup)
                await launched.child.wait()
            outputs.append(out.read_text())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGRTMIN, before[1])
    assert outputs[0] == outputs[1]
    assert "SigBlk:\t0000000000000000\n" in outputs[0]


#: What a container shows of itself, its root and its namespaces.
VIEW = (
    "cd /proc/self; umask; cat limits cgroup oom_score_adj; grep -vE '^(Vm|Rss|SigQ|.*ctxt)' status;"
    " cut -d' ' -f4- mountinfo | sed -E 's/(shared|master|propagate_from):[0-9]+//'; ls -ln /dev; ls fd; hostname;"
    " cat /proc/1/comm; ls /sys/class/net; cat /sys/class/net/lo/flags"
)


async def test_a_container_is_like_one_by_spawn(box: Served, cgroup: Cgroup) -> None:
    value = config("sh", "-c", VIEW, oomScoreAdj=300)
    value["linux"]["namespaces"].append({"type": "cgroup"})
    value["linux"]["maskedPaths"] = ["/sys/firmware"]
    outputs = []
    for server in (box.server, None):
        box.launcher.starter.server = server
        outputs.append(await box.output(value, cgroup=cgroup))
    assert outputs[0] == outputs[1]
    assert outputs[0][0] == 0 and "\n300\n" in outputs[0][1] and "\n0::/\n" in outputs[0][1]
    assert box.server.pid > 0


async def test_it_clones_a_container_in_one_step(box: Served) -> None:
    """Without an intermediate stage, unless one is needed outside the container."""
    ids = {name: [{"containerID": 0, "hostID": 100000, "size": 1000}] for name in ("uidMappings", "gidMappings")}
    user = config()
    user["linux"] |= ids
    user["linux"]["namespaces"].append({"type": "user"})
    mapped = config()
    mapped["mounts"].append(
        {"destination": "/mnt", "type": "bind", "source": str(box.rootfs / "tmp"), "options": ["bind", "idmap"]} | ids
    )
    first = await box.running()
    joining = config()
    joining["hostname"] = ""
    near = {"uts": f"/proc/{first.child.pid}/ns/uts", "network": f"/proc/{first.child.pid}/ns/net"}
    beside = copy.deepcopy(joining)
    beside["mounts"] = [mount for mount in beside["mounts"] if mount["type"] != "proc"]
    beside["linux"] |= {"maskedPaths": [], "readonlyPaths": []}
    for value, join, count in (
        (config(), {}, 0),
        (joining, near, 0),
        (user, {}, 2),
        (mapped, {}, 1),
        (beside, {"pid": f"/proc/{first.child.pid}/ns/pid"}, 1),
    ):
        launched = await box.create(value, join=join)
        assert len(launched.stages) == count
        await box.start(launched)
        assert await launched.child.wait() == 0


async def test_namespaces_are_joined_after_the_clone(box: Served) -> None:
    first = await box.running()
    join = {name: f"/proc/{first.child.pid}/ns/{name}" for name in ("uts", "ipc")}
    value = config("sh", "-c", "cd /proc/self/ns; readlink uts; readlink ipc")
    value["hostname"] = ""
    _, out, _ = await box.output(value, join=join)
    assert out.split() == [str(Path(path).readlink()) for path in join.values()]


async def test_an_invalid_configuration_leaves_nothing(box: Served) -> None:
    """It is found while the container's first process is already being cloned."""
    value = config()
    value["mounts"].append({"destination": "/", "type": "tmpfs"})
    for _ in range(3):
        with pytest.raises(SpecError, match="must not be the container's root"):
            await box.create(value)
    assert not box.fifo.exists()
    assert children() == [box.server.pid]


async def test_messages_longer_than_the_socket_holds_arrive(box: Served) -> None:
    args = ["sh", "-c", "echo $# ${#1}", "sh", *(["x" * 100_000] * 12)]
    assert await box.output(config(*args)) == (0, "12 100000\n", "")


async def test_messages_that_may_exceed_a_memory_limit_are_read_outside(
    box: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Any] = []
    monkeypatch.setattr(box.server, "request", lambda *arguments: requests.append(arguments))
    value = config("sleep", "100")
    value["linux"]["resources"] = {"memory": {"limit": 1 << 20}}
    init = await box.create(value)
    await box.start(init)
    with box.stdio() as (stdio, _, _):
        process = Process(("true",), env=("PATH=/bin",))
        launched = await box.launch_exec(process, init, Spec.from_json(value), stdio)
        assert await launched.child.wait() == 0
    assert requests == []


async def test_a_terminal(box: Served) -> None:
    init = await box.running()
    process = Process(("sh", "-c", "test -t 0 && test -t 2"), env=("PATH=/bin",), terminal=True)
    launched = await box.launch_exec(process, init, Spec.from_json(config()), None)
    assert await launched.child.wait() == 0
    assert launched.console is not None
    os.close(launched.console)


async def test_an_error_is_that_of_a_spawn(box: Served) -> None:
    init = await box.running()
    texts = []
    for server in (box.server, None):
        box.launcher.starter.server = server
        for program, given in (("true", Removed()), ("missing", None)):
            with pytest.raises(LaunchError) as caught:
                await box.status(init, program, cgroup=given)
            texts.append(str(caught.value))
    assert texts[:2] == texts[2:]
    assert "clone into cgroup" in texts[0]


async def test_a_dead_one_is_replaced(box: Served) -> None:
    init = await box.running()
    assert await box.status(init, "true") == 0
    first = box.server.pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: first not in children(), "it has been reaped")
    assert await box.status(init, "true") == 0
    assert box.server.pid != first


async def test_one_that_dies_with_a_request(box: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    init = await box.running()
    assert await box.status(init, "true") == 0
    os.kill(box.server.pid, signal.SIGSTOP)
    call, request = asyncio.ensure_future(box.status(init, "true")), box.server.request

    def requested(*arguments: Any) -> None:
        request(*arguments)
        os.kill(box.server.pid, signal.SIGKILL)

    monkeypatch.setattr(box.server, "request", requested)
    with pytest.raises(LaunchError, match="could not be started"):
        await call
    monkeypatch.undo()
    assert await box.status(init, "true") == 0


async def test_one_that_hangs_is_killed(box: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init_process, "CLEANUP_TIMEOUT", 0.2)
    init = await box.running()
    assert await box.status(init, "true") == 0
    first = box.server.pid
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(LaunchError, match="longer than"):
        await box.status(init, "true")
    await until(lambda: first not in children(), "it has been killed")
    assert await box.status(init, "true") == 0


async def test_one_whose_process_hangs_is_not_killed(box: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the kernel, at a mount: SIGKILL has no effect there."""
    announced, pids = InitProcess._announced, []

    def stop(started: InitProcess, stage1: int, stage2: int) -> None:
        announced(started, stage1, stage2)
        pids.append(stage2)
        os.kill(stage2, signal.SIGSTOP)

    monkeypatch.setattr(init_process, "CLEANUP_TIMEOUT", 0.2)
    monkeypatch.setattr(InitProcess, "_announced", stop)
    monkeypatch.setattr(SetupChannel, "kill", lambda _: None)
    with pytest.raises(LaunchError, match="longer than"):
        await box.create(config())
    (pid,) = pids
    assert set(children()) == {box.server.pid, pid}
    os.kill(pid, signal.SIGKILL)
    await until(lambda: children() == [box.server.pid], "it has been reaped")


@pytest.mark.parametrize(
    ("text", "count"),
    [(b"", 3), (b"A=1", 3), (b"A=1\0", 2), (b"A=1\0" * 33, 3), (b"A=1\0", 0), (bytes(5000), 3)],
    ids=["empty", "unterminated", "too few descriptors", "too many strings", "no descriptors", "too long"],
)
def test_it_exits_at_a_malformed_request(sealed: Nsexec, text: bytes, count: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        pid = sealed.spawn(None, [theirs.fileno()], {"_CAISSON_SERVER": str(theirs.fileno())})
        theirs.close()
        fds = array.array("i", [ours.fileno()] * count)
        ours.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if count else [])
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (0 if text == b"" else 1)


def test_it_exits_with_the_runtime(sealed: Nsexec) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = sealed.spawn(None, [theirs.fileno()], {"_CAISSON_SERVER": str(theirs.fileno())})
    theirs.close()
    ours.close()
    assert os.waitpid(pid, 0)[1] == 0

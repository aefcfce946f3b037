"""Test a sandbox whose containers share a pid namespace: its init process, lifetimes, and isolation."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.client import Agent, Container
from caisson.agent.rpc.codes import StatusCode
from caisson.proto.kata1 import agent_pb2, oci_pb2
from tests.native.agent_support import ROOT, RunningAgent, output, refused, sh
from tests.support.poll import until

pytestmark = pytest.mark.root


async def shared(client: Agent) -> None:
    await client.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(sandbox_id="pod", sandbox_pidns=True))


async def container(client: Agent, agent: RunningAgent, name: str, *args: str, **options: Any) -> Container:
    made = await client.create_container(name, agent.spec(*args, **options))
    await made.start()
    return made


def pause_of(agent: RunningAgent) -> int:
    [pid] = [pid for pid in agent.children() if Path(f"/proc/{pid}/comm").read_text() == "pause\n"]
    return pid


def namespace(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/pid").readlink())


def inside(agent: RunningAgent) -> dict[int, str]:
    """Return the processes in the shared pid namespace: their pids outside, and their names."""
    wanted, found = namespace(pause_of(agent)), {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str((path / "ns/pid").readlink()) == wanted:
                found[int(path.name)] = (path / "comm").read_text().strip()
    return found


async def test_containers_see_each_other_and_a_first_process_that_reaps(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await shared(client)
        one = await container(client, agent, "one", "sleep", "1111")
        two = await container(client, agent, "two", "sleep", "2222")
        names = (await output(await sh(one, "cat /proc/[0-9]*/comm"))).decode().split()
        assert names.count("sleep") == 2
        assert (await output(await sh(two, "cat /proc/1/comm"))) == b"pause\n"
        # Orphans, one and many: the pause process reaps them.
        script = "for n in 1 2 3 4 5; do (sleep 0.1 &) ; done; sleep 0.3; grep -l '^State:.Z' /proc/[0-9]*/status"
        assert (await output(await sh(one, script))) == b""
        pause = pause_of(agent)
        await until(lambda: set(inside(agent).values()) == {"pause", "sleep"}, "only those are left")
        status = Path(f"/proc/{pause}/status").read_text()
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert f"{name}:\t{0:016x}" in status
        assert "Uid:\t65534" in status and "NoNewPrivs:\t1" in status
        assert list(Path(f"/proc/{pause}/fd").iterdir()) == []
        limits = Path(f"/proc/{pause}/limits").read_text()
        assert re.search(r"Max processes +1 +1 ", limits) and re.search(r"Max address space +\d{8} +\d{8} ", limits)
        # Its namespaces are separate from the guest's, except those that would need privileges to use.
        for kind in ("ipc", "uts", "net", "mnt", "pid", "cgroup"):
            ours, its = (Path(f"/proc/{pid}/ns/{kind}").readlink() for pid in (agent.process.pid, pause))
            assert ours != its, kind
        assert list(Path(f"/proc/{pause}/root").iterdir()) == []
        await client.destroy_sandbox()
        assert not Path(f"/proc/{pause}").exists()
    assert agent.children() == set()


async def test_a_signal_without_a_handler_ends_who_is_not_the_first_of_its_namespace(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await shared(client)
        one = await container(client, agent, "one", "sleep", "1111")
        await one.init().signal(signal.SIGTERM)
        assert await one.init().wait() == 143
        await client.destroy_sandbox()


async def test_each_container_still_has_its_own_mounts_and_its_masks(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await shared(client)
        one = await container(client, agent, "one")
        two = await container(client, agent, "two")
        ours = (await output(await sh(one, "for n in mnt pid; do readlink /proc/self/ns/$n; done"))).split()
        theirs = (await output(await sh(two, "for n in mnt pid; do readlink /proc/self/ns/$n; done"))).split()
        assert ours[0] != theirs[0] and ours[1] == theirs[1]
        assert (await output(await sh(one, "wc -c < /proc/keys"))) == b"0\n"
        assert b"proc /proc proc rw,nosuid,nodev,noexec" in await output(await sh(one, "cat /proc/mounts"))
        assert await (await sh(one, "echo 0 > /proc/sys/kernel/sysrq")).wait() != 0
        await client.destroy_sandbox()


async def test_terminals_exit_statuses_and_errors_are_as_ever(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await shared(client)
        one = await container(client, agent, "one", "sh", "-c", "tty; stty size; exec sleep 1000", terminal=True)
        assert b"/dev/pts/0" in await anext(aiter(one.init().stdout()))
        shell = await one.exec(["sh", "-c", "tty; kill -9 $$"], env=["PATH=/bin"], terminal=True)
        assert b"/dev/pts/" in await output(shell)
        assert await shell.wait() == 137
        for args, text in ((["nothere"], "executable file not found in $PATH"), (["/etc"], "is a directory")):
            code, said = await refused(one.exec(args, env=["PATH=/bin"]))
            assert code is StatusCode.INTERNAL and text in said
            code, said = await refused(client.create_container("bad", agent.spec(*args)))
            assert code is StatusCode.INTERNAL and text in said
        two = await client.create_container("two", agent.spec("sh", "-c", "exit 7"))
        code, said = await refused(client.create_container("two", agent.spec("true")))
        assert code is StatusCode.ALREADY_EXISTS
        await two.start()
        assert await two.init().wait() == 7
        code, said = await refused(two.start())
        assert code is StatusCode.FAILED_PRECONDITION
        three = await client.create_container("three", agent.spec("true"))
        await three.signal(signal.SIGKILL)
        assert await three.init().wait() == 137
        await client.destroy_sandbox()
    assert agent.children() == set()


async def test_the_end_of_a_container_is_the_end_of_all_in_it(agent: RunningAgent) -> None:
    """Its orphans, its execs and processes that ignore signals; not those of others."""
    leaves = "(trap '' TERM HUP; setsid sleep 4444 &) ; (sleep 4444 &)"

    async with agent.connect() as client:
        await shared(client)
        other = await container(client, agent, "other", "sleep", "1111")
        for remove in (False, True):
            one = await container(client, agent, "one", "sh", "-c", f"{leaves}; read x; exit 3")
            await (await sh(one, leaves)).wait()
            execed = await one.exec(["sleep", "4444"], env=["PATH=/bin"])
            await until(lambda: len(inside(agent)) == 8, "all are running")
            if remove:
                await one.remove()
                await until(lambda: sorted(inside(agent).values()) == ["pause", "sleep"], "only the other is left")
            else:
                await one.init().write(b"\n")
                assert await one.init().wait() == 3
                assert await execed.wait() == 137
                await until(lambda: len(inside(agent)) == 2, "all are gone")
                await one.remove()
        assert await (await sh(other, "true")).wait() == 0
        await client.destroy_sandbox()
    assert agent.children() == set()


async def test_destroying_leaves_nothing_and_it_can_be_made_again(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        for _ in range(3):
            await shared(client)
            for number in range(4):
                await container(client, agent, f"c{number}", "sh", "-c", "(setsid sleep 4444 &) ; sleep 4444")
            await client.create_container("never-started", agent.spec("true"))
            there = inside(agent)
            await client.destroy_sandbox()
            assert agent.children() == set()
            assert not any(Path(f"/proc/{pid}").exists() for pid in there)
            assert list(agent.state.rglob("*")) == []
        await client.create_sandbox()
        request = agent_pb2.CreateContainerRequest(container_id="c", OCI=agent.spec(), sandbox_pidns=True)
        code, text = await refused(client.rpc.CreateContainer(request))
        assert code is StatusCode.UNIMPLEMENTED
        assert text == "CreateContainer: sandbox_pidns needs a sandbox that was created with it"
        await client.destroy_sandbox()


async def test_a_pid_namespace_from_the_wire_is_refused_here_too(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await shared(client)
        spec = agent.spec()
        spec.Linux.Namespaces.append(oci_pb2.LinuxNamespace(Type="pid", Path="/proc/1/ns/pid"))
        code, text = await refused(client.create_container("box", spec))
        assert code is StatusCode.FAILED_PRECONDITION
        assert text.startswith("Unexpected PID namespace received for container box")
        spec = agent.spec()
        spec.Mounts[0].options.append("hidepid=2")
        code, text = await refused(client.create_container("box", spec))
        assert text == "mounts[0].options: 'hidepid=2' cannot be asked for in a shared pid namespace"
        await client.destroy_sandbox()


async def test_the_first_process_hears_only_the_agent(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await shared(client)
        one = await container(client, agent, "one", "sleep", "1000")
        pause = pause_of(agent)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1):
            os.kill(pause, number)
        await (await sh(one, "kill -9 1; kill -TERM 1; true")).wait()
        await until(lambda: sorted(inside(agent).values()) == ["pause", "sleep"], "both keep running")
        assert "State:\tS" in Path(f"/proc/{pause}/status").read_text()


ORPHAN = """
import asyncio, os, sys
from pathlib import Path
from caisson.agent.base.signals import Signals
from caisson.agent.libcontainer.process.launcher import ProcessLauncher
from caisson.agent.libcontainer.process.nsexec import Nsexec
from caisson.agent.libcontainer.process.starter import Starter
from caisson.agent.model.reaper import Reaper
from caisson.agent.model.waits import AsyncioWaits
async def main():
    reaper = Reaper()
    reaper.start(Signals(asyncio.get_running_loop()))
    nsexec = Nsexec.seal(Path(sys.argv[1]))
    launcher = ProcessLauncher(Starter(nsexec, reaper, AsyncioWaits(), lambda *_, **__: None))
    print((await launcher.pause(sys.argv[2], sys.argv[3], {})).pid, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


def test_the_first_process_ends_with_an_agent_that_is_killed(nsexec_path: Path, tmp_path: Path) -> None:
    for name in ("proc", "empty"):
        (tmp_path / name).mkdir()
    args = [str(nsexec_path), str(tmp_path / "proc"), str(tmp_path / "empty")]
    # In its own mount namespace, so that nobody can unmount it.
    with subprocess.Popen(
        ["unshare", "--mount", sys.executable, "-c", ORPHAN, *args], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as agent:
        assert agent.stdout is not None
        lines = iter(agent.stdout)
        pid = int(next(line for line in lines if line.strip().isdigit()))
        pidfd = os.pidfd_open(pid)
        agent.kill()
    assert select.select([pidfd], [], [], 10)[0], "it must keep running"
    os.close(pidfd)

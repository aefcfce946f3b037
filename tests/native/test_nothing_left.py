"""Test that a failing create or exec leaves nothing in the agent: descriptors, children, mounts or cgroups."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.client import Agent, AgentError, Container
from caisson.proto.kata1 import agent_pb2, oci_pb2
from tests.native.agent_support import ROOT, RunningAgent, output
from tests.native.conftest import check_nothing_is_left
from tests.native.nsexec_support import make_rootfs
from tests.native.test_faults import FAULT_COMM, POINTS
from tests.support.poll import until

pytestmark = pytest.mark.root

Spec = oci_pb2.Spec


class Holdings:
    """An agent's resources: numbers of descriptors, children, mounts and threads, and its cgroups and files."""

    def __init__(self, agent: RunningAgent) -> None:
        self._agent = agent
        self._before = self._now()

    def _now(self) -> dict[str, Any]:
        mounts = Path(f"/proc/{self._agent.pid}/mountinfo").read_text().count("\n")
        state = sorted(str(path) for path in self._agent.state.rglob("*"))
        cgroups = sorted(map(str, self._agent.cgroups()))
        return {
            "descriptors": self._agent.fds(), "children": len(self._agent.children()), "mounts": mounts,
            "cgroups": cgroups, "files": state,
        }  # fmt: skip

    def differences(self) -> dict[str, Any]:
        now = self._now()
        return {name: (was, now[name]) for name, was in self._before.items() if now[name] != was}

    async def are_as_before(self, after: str) -> None:
        """Wait for what ends by itself (a killed child), then compare."""
        await until(lambda: not self.differences(), f"nothing is left after {after}", 5, self.differences)


def with_mount(**fields: Any) -> Callable[[Spec], object]:
    return lambda spec: spec.Mounts.add(**fields)


def with_namespace(kind: str, path: str = "") -> Callable[[Spec], object]:
    return lambda spec: spec.Linux.Namespaces.add(Type=kind, Path=path)


def mapped(spec: Spec) -> None:
    spec.Linux.Namespaces.add(Type="user")
    for maps in (spec.Linux.UIDMappings, spec.Linux.GIDMappings):
        maps.add(ContainerID=5, HostID=1 << 31, Size=1)
        maps.add(ContainerID=5, HostID=1 << 31, Size=1)


def set_field(**fields: Any) -> Callable[[Spec], object]:
    """Change fields of the process, or with "root_" of the root."""

    def change(spec: Spec) -> None:
        for name, value in fields.items():
            target: Any = spec.Root if name.startswith("root_") else spec.Process
            name = name.removeprefix("root_")
            if isinstance(value, list):
                del getattr(target, name)[:]
                getattr(target, name).extend(value)
            else:
                setattr(target, name, value)

    return change


def user(spec: Spec) -> None:
    spec.Process.User.Username = "nobody-knows"


def limit(**fields: Any) -> Callable[[Spec], object]:
    return lambda spec: spec.Linux.Resources.MergeFrom(oci_pb2.LinuxResources(**fields))


def hook(kind: str, path: str) -> Callable[[Spec], object]:
    return lambda spec: getattr(spec.Hooks, kind).add(Path=path, Args=["hook"], Timeout=1)


#: Configurations that fail, each in a different place.
BAD: dict[str, Callable[[Spec], object]] = {
    "a root that is not there": set_field(root_Path="/no/such/root"),
    "a root that is a file": set_field(root_Path="/etc/hostname"),
    "a program that is not there": set_field(Args=["/no/such/program"]),
    "a program that is none": set_field(Args=["/etc/passwd"]),
    "a program that is not found": set_field(Args=["no-such-program"]),
    "no program": set_field(Args=[]),
    "a terminal, and no program": set_field(Args=["/no/such/program"], Terminal=True),
    "a working directory that is a file": set_field(Cwd="/etc/passwd"),
    "a working directory of the runtime's": set_field(Cwd="/proc/self/fd/7"),
    "a user without a name": user,
    "a capability that is none": lambda spec: spec.Process.Capabilities.Bounding.append("CAP_NO_SUCH"),
    "a limit that is none": lambda spec: spec.Process.Rlimits.add(Type="RLIMIT_NO_SUCH", Hard=1, Soft=1),
    "a soft limit above the hard": lambda spec: spec.Process.Rlimits.add(Type="RLIMIT_CORE", Hard=1, Soft=2),
    "an LSM that is not there": set_field(SelinuxLabel="a:b:c:d"),
    "a mount of an unknown type": with_mount(destination="/mnt", type="no-such-fs", source="x"),
    "a mount of nothing": with_mount(destination="/mnt", type="bind", source="/no/such/source", options=["bind"]),
    "a mount with an unknown option": with_mount(destination="/mnt", type="tmpfs", source="x", options=["size=huge"]),
    "a mount over proc": with_mount(destination="/proc", type="tmpfs", source="x"),
    "a mount below a file": with_mount(destination="/etc/passwd/x", type="tmpfs", source="x"),
    "a namespace of no kind": with_namespace("no-such"),
    "a pid namespace": with_namespace("pid"),
    "a user namespace without maps": with_namespace("user"),
    "maps that overlap": mapped,
    "a cgroup path that leads out": lambda spec: setattr(spec.Linux, "CgroupsPath", "a/../../b"),
    "a limit of a page size that is not there": limit(HugepageLimits=[{"Pagesize": "3MB", "Limit": 1}]),
    "a limit that v2 lacks": limit(Memory={"Swappiness": 60}),
    "a sysctl that is none": lambda spec: spec.Linux.Sysctl.update({"kernel.msg_no_such": "1"}),
    "a sysctl of the guest": lambda spec: spec.Linux.Sysctl.update({"kernel.core_pattern": "x"}),
    "a device that is none": lambda spec: spec.Linux.Devices.add(Path="/dev/x", Type="z"),
    "a device in a place that is none": lambda spec: spec.Linux.Devices.add(Path="/proc/x/y", Type="c", Major=1),
    "a filter that is none": lambda spec: setattr(spec.Linux.Seccomp, "DefaultAction", "SCMP_ACT_NO_SUCH"),
    "a prestart hook that is not there": hook("Prestart", "/no/such/hook"),
    "a prestart hook that fails": hook("Prestart", "/bin/false"),
    "words with a NUL": set_field(Args=["/bin/true", "a\0b"]),
    "words that are too many": set_field(Args=["/bin/true", *["x" * 100_000] * 40]),
}

#: Processes that cannot be executed in a container.
BAD_EXECS: dict[str, dict[str, Any]] = {
    "a program that is not there": {"Args": ["/no/such/program"]},
    "a terminal, and no program": {"Args": ["/no/such/program"], "Terminal": True},
    "a program that is none": {"Args": ["/etc/passwd"]},
    "no program": {"Args": []},
    "a working directory that is not there": {"Args": ["/bin/true"], "Cwd": "/no/such"},
    "a working directory of the runtime's": {"Args": ["/bin/true"], "Cwd": "/proc/self/fd/7"},
    "a user without a name": {"Args": ["/bin/true"], "User": {"Username": "nobody-knows"}},
    "words with a NUL": {"Args": ["/bin/true", "a\0b"]},
    "words that are too many": {"Args": ["/bin/true", *["x" * 100_000] * 40]},
}


async def fails(work: Any) -> str:
    """Return the text of a call that must fail, but not because of a bug."""
    try:
        await work
    except AgentError as error:
        assert "bug" not in error.details, error.details
        return error.details
    raise AssertionError("the call should have failed")


async def base(client: Agent, agent: RunningAgent) -> Container:
    """Run another container, after everything that is imported lazily has been."""
    await client.create_sandbox()
    container = await client.ensure_container("base", agent.spec())
    await output(await container.exec(["/bin/true"]))
    spec = agent.spec("/no/such/program")
    spec.Process.User.Username = "root"
    await fails(client.create_container("warm", spec))
    for number in range(2):  # threads
        await asyncio.gather(*(client.rpc.StatsContainer(agent_pb2.StatsContainerRequest(container_id="base"))
                               for _ in range(number + 1)))  # fmt: skip
    return container


@pytest.mark.parametrize("agent", ["v2", "v1"], indirect=True)
async def test_nothing_is_left_of_a_create_that_fails(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await base(client, agent)
        held = Holdings(agent)
        failed = 0
        for what, change in BAD.items():
            spec = agent.spec("/bin/true")
            change(spec)
            try:
                container = await client.create_container("bad", spec)
            except AgentError as error:
                assert "bug" not in error.details, (what, error.details)
                failed += 1
            else:
                assert what in ("a capability that is none", "a limit that v2 lacks", "a program that is none"), what
                await container.remove()
            await held.are_as_before(what)
        assert failed > len(BAD) - 4


async def test_nothing_is_left_of_an_exec_that_fails(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await base(client, agent)
        held = Holdings(agent)
        for what, fields in BAD_EXECS.items():
            process = oci_pb2.Process(**{"Cwd": "/", "Env": ["PATH=/bin"], **fields})
            request = agent_pb2.ExecProcessRequest(container_id="base", exec_id="bad", process=process)
            await fails(client.rpc.ExecProcess(request))
            await held.are_as_before(what)
        directory = agent.rootfs / "etc/passwd"
        plain = directory.read_text()
        directory.unlink()
        directory.mkdir()
        try:
            process = oci_pb2.Process(Args=["/bin/true"], Cwd="/", User={"Username": "root"})
            request = agent_pb2.ExecProcessRequest(container_id="base", exec_id="bad", process=process)
            said = await fails(client.rpc.ExecProcess(request))
            assert said == "process.user.username: the container's /etc/passwd is a directory"
            await held.are_as_before(said)
        finally:
            directory.rmdir()
            directory.write_text(plain)


@pytest.fixture
def faulty_agent(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[RunningAgent, Path]]:
    """Start an agent whose nsexec stops where the file says."""
    build = tmp_path_factory.mktemp("faults")
    subprocess.run(["make", "-s", "-C", ROOT / "agent/nsexec", f"BUILD={build}", "FAULTS=1"], check=True)
    file = build / "point"
    file.write_text("")
    monkeypatch.setenv("CAISSON_FAULT_FILE", str(file))
    with tempfile.TemporaryDirectory(prefix="caisson-box-") as directory:
        Path(directory).chmod(0o755)  # pytest's own directories are inaccessible to the root of a user namespace
        rootfs = make_rootfs(Path(directory) / "rootfs")
        running = RunningAgent(tmp_path, build / "nsexec", rootfs, module="tests.native.faulty_agent")
        yield running, file
        file.write_text("")
        running.stop()
        check_nothing_is_left(running, tmp_path)


def stopped_children(agent: RunningAgent) -> int:
    for pid in agent.children():
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == FAULT_COMM:
                return pid
    return 0


async def test_nothing_is_left_wherever_nsexec_is_killed(faulty_agent: tuple[RunningAgent, Path]) -> None:
    agent, file = faulty_agent

    async def interrupted(work: Any, point: str) -> bool:
        """Return whether the point was reached; if so, its stage was killed, and the call must have failed."""
        file.write_text(point)
        call = asyncio.ensure_future(work)
        try:
            while not call.done():
                if pid := stopped_children(agent):
                    os.kill(pid, signal.SIGKILL)
                    with suppress(AgentError):
                        await call
                    return True
                await asyncio.sleep(0.001)
            await call
            return False
        finally:
            file.write_text("")

    def plain() -> Spec:
        return agent.spec("/bin/true")

    def in_user_namespace() -> Spec:
        spec = agent.spec("/bin/true")
        spec.Linux.Namespaces.add(Type="user")
        for maps in (spec.Linux.UIDMappings, spec.Linux.GIDMappings):
            maps.add(ContainerID=0, HostID=100000, Size=65536)
        # These belong to namespaces that are not its own.
        kept = [mount for mount in spec.Mounts if mount.type not in ("mqueue", "sysfs")]
        del spec.Mounts[:]
        spec.Mounts.extend(kept)
        spec.Hostname = ""
        return spec

    def on_a_terminal() -> Spec:
        return agent.spec("/bin/true", terminal=True)

    async with agent.connect() as client:
        container = await base(client, agent)

        async def run(make: Callable[[], Spec]) -> None:
            made = await client.create_container("bad", make())
            try:
                await made.start()
            finally:
                await made.remove()

        async def execute(terminal: bool) -> None:
            for pid in agent.fork_servers():  # the next one is told where to stop
                os.kill(pid, signal.SIGKILL)
            await until(lambda: not agent.fork_servers(), "the fork server is killed")
            process = await container.exec(["/bin/true"], terminal=terminal)
            await output(process)
            await process.wait()

        await run(plain)
        await execute(False)
        held = Holdings(agent)
        met = set()
        for point in POINTS:
            for make in (plain, in_user_namespace, on_a_terminal):
                if await interrupted(run(make), point):
                    met.add(point)
                await held.are_as_before(f"{make.__name__} at {point}")
            for terminal in (False, True):
                if await interrupted(execute(terminal), point):
                    met.add(point)
                await execute(False)
                await held.are_as_before(f"an exec, on a terminal: {terminal}, at {point}")
        assert met >= set(POINTS) - {"stage1_offsets"}

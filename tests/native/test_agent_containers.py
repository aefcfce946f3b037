"""Test sandbox and containers over the real API on this machine: states, errors with their texts, and cleanup."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.client import AgentError
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.contract import VERSION
from caisson.proto.kata1 import agent_pb2, health_pb2, oci_pb2
from tests.native.agent_support import RunningAgent, output, refused, sh

pytestmark = pytest.mark.root
IDS: dict[str, Any] = {"container_id": "box", "exec_id": "box"}


async def test_health_before_there_is_a_sandbox(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        assert await client.version() == VERSION
        answer = await client.health.Check(health_pb2.CheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        details = await client.rpc.GetGuestDetails(agent_pb2.GuestDetailsRequest(mem_block_size=True))
        assert details.agent_details.version == VERSION
        assert not details.agent_details.init_daemon


GATE: list[tuple[str, Any, str]] = [
    ("CreateContainer", agent_pb2.CreateContainerRequest(container_id="box"),
     "Sandbox not started, impossible to run a new container"),
    ("StartContainer", agent_pb2.StartContainerRequest(container_id="box"), "Sandbox not started"),
    ("ExecProcess", agent_pb2.ExecProcessRequest(**IDS), "Sandbox not started"),
    ("SignalProcess", agent_pb2.SignalProcessRequest(**IDS), "Sandbox not started, impossible to signal the container"),
    ("WaitProcess", agent_pb2.WaitProcessRequest(**IDS), "Sandbox not started"),
    ("WriteStdin", agent_pb2.WriteStreamRequest(**IDS), "Sandbox not started"),
    ("ReadStdout", agent_pb2.ReadStreamRequest(**IDS), "Sandbox not started"),
    ("ReadStderr", agent_pb2.ReadStreamRequest(**IDS), "Sandbox not started"),
    ("CloseStdin", agent_pb2.CloseStdinRequest(**IDS), "Sandbox not started"),
    ("TtyWinResize", agent_pb2.TtyWinResizeRequest(**IDS), "Sandbox not started"),
]  # fmt: skip


async def test_without_a_sandbox(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        for method, request, text in GATE:
            assert await refused(getattr(client.rpc, method)(request)) == (Code.FAILED_PRECONDITION, text), method
        code, text = await refused(client.container("box").remove())
        assert (code, text) == (Code.NOT_FOUND, "Container box not found")
        await client.destroy_sandbox()


async def test_unknown_containers_and_processes(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        for method, request, _ in GATE[1:]:
            code, text = await refused(getattr(client.rpc, method)(request))
            if method == "SignalProcess":
                assert code is Code.FAILED_PRECONDITION
                assert text.startswith("Could not signal process box: rpc error: code = NotFound desc = Container")
            else:
                assert (code, text) == (Code.NOT_FOUND, "Container box not found"), method
        await client.ensure_container("box", agent.spec())
        for method, request, _ in GATE[3:]:
            request.exec_id = "nobody"
            code, text = await refused(getattr(client.rpc, method)(request))
            assert code is Code.NOT_FOUND, method
            assert text.endswith("Process nobody not found (container box)"), method
            request.exec_id = "box"


async def test_a_sandbox_starts_once_and_again_after_its_end(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        assert await client.create_sandbox("pod", hostname="pod-host")
        code, text = await refused(client.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest()))
        assert (code, text) == (Code.ALREADY_EXISTS, "Sandbox already started, impossible to start again")
        spec = agent.spec()
        spec.Hostname = ""
        container = await client.ensure_container("box", spec)
        assert await output(await sh(container, "hostname")) == b"pod-host\n"
        assert (agent.state / "pod/box/state.json").exists()
        await client.destroy_sandbox()
        assert list(agent.state.iterdir()) == []
        assert await client.create_sandbox()
        await client.ensure_container("box", agent.spec())


async def test_containers_of_a_sandbox_share_ipc_and_uts_and_nothing_else(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        seen = []
        for name in ("one", "two"):
            container = await client.ensure_container(name, agent.spec())
            links = await output(
                await sh(container, "for n in ipc uts net mnt pid cgroup; do readlink /proc/self/ns/$n; done")
            )
            seen.append(links.decode().split())
        one, two = seen
        assert one[:3] == two[:3]
        assert one[2] == str(Path("/proc/self/ns/net").readlink())
        assert one[0] != str(Path("/proc/self/ns/ipc").readlink())
        assert not set(one[3:]) & set(two[3:])


async def test_states(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.create_container("box", agent.spec("/bin/sh", "-c", "read x; exit 3"))
        code, text = await refused(client.create_container("box", agent.spec()))
        assert (code, text) == (Code.ALREADY_EXISTS, "Container box already exists, impossible to create")
        waiter = asyncio.create_task(container.init().wait())  # before it is started
        await container.start()
        code, text = await refused(container.start())
        assert (code, text) == (Code.FAILED_PRECONDITION, "Container box status running, should be created")
        await container.init().write(b"\n")
        assert await waiter == 3
        code, text = await refused(container.start())
        assert (code, text) == (Code.FAILED_PRECONDITION, "Container box status stopped, should be created")
        code, text = await refused(container.exec(["/bin/true"]))
        assert (code, text) == (Code.FAILED_PRECONDITION, "Cannot exec in stopped container box")
        await container.init().signal(15)  # it has stopped, as requested
        await container.remove()
        assert (await refused(container.remove()))[0] is Code.NOT_FOUND


async def test_many_first_users_of_a_container_all_get_it(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        containers = await asyncio.gather(*(client.ensure_container("box", agent.spec()) for _ in range(10)))
        for container in containers:
            assert await output(await sh(container, "echo $PPID")) == b"0\n"


async def test_a_container_that_has_ended_makes_room(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec())
        await container.init().signal(9)
        await container.init().wait()
        again = await asyncio.gather(*(client.ensure_container("box", agent.spec()) for _ in range(5)))
        assert await output(await sh(again[0], "echo here")) == b"here\n"


async def test_a_sandbox_that_ends_waits_for_containers_in_the_making(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        creates = [asyncio.ensure_future(client.create_container(f"c{n}", agent.spec())) for n in range(5)]
        await asyncio.sleep(0.01)
        await client.destroy_sandbox()
        for error in await asyncio.gather(*creates, return_exceptions=True):
            assert not isinstance(error, AgentError) or error.code is Code.FAILED_PRECONDITION
        assert list(agent.state.iterdir()) == []
        assert agent.children() == set()


async def test_an_exec_id_is_taken_once(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec())
        await container.exec(["/bin/sleep", "1000"], exec_id="one")
        assert (await refused(container.exec(["/bin/true"], exec_id="one")))[0] is Code.ALREADY_EXISTS
        assert (await refused(container.exec(["/bin/true"], exec_id="box")))[0] is Code.ALREADY_EXISTS


@pytest.mark.parametrize("state", ["created", "running", "stopped"])
async def test_removal_in_any_state_leaves_nothing(agent: RunningAgent, state: str) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        fds, children = agent.fds(), agent.children()
        container = await client.create_container("box", agent.spec())
        if state != "created":
            await container.start()
            await container.exec(["/bin/sleep", "1000"])
        if state == "stopped":
            await container.init().signal(9)
            await container.init().wait()
        await container.remove(timeout=20)
        assert sorted(path.name for path in (agent.state / "sandbox").iterdir()) == [".namespaces"]
        assert agent.children() == children
        assert agent.fds() <= fds + 1  # the connection's own
        assert not agent.cgroups()
        await client.ensure_container("box", agent.spec())


async def test_a_failed_create_leaves_nothing_and_the_id_is_free(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        fds, children = agent.fds(), agent.children()
        bad_mount = agent.spec()
        bad_mount.Mounts.append(oci_pb2.Mount(destination="/x", type="no-such-fs", source="x"))
        bad_root = agent.spec()
        bad_root.Root.Path = "/no/such/root"
        for spec in (agent.spec("no-such-program"), bad_mount, bad_root):
            code, text = await refused(client.create_container("box", spec))
            assert code is Code.INTERNAL, text
            assert text.startswith("Could not run process: ")
        assert sorted(path.name for path in (agent.state / "sandbox").iterdir()) == [".namespaces"]
        assert agent.children() == children
        assert agent.fds() <= fds + 1
        await client.ensure_container("box", agent.spec())


async def test_requests_without_sense_get_a_status(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec())
        create, execute = client.rpc.CreateContainer, client.rpc.ExecProcess
        no_root, empty = oci_pb2.Spec(Process=oci_pb2.Process(Args=["x"])), oci_pb2.Spec()
        requests = [
            create(agent_pb2.CreateContainerRequest(container_id="new")),
            create(agent_pb2.CreateContainerRequest(container_id="new", OCI=empty)),
            create(agent_pb2.CreateContainerRequest(container_id="new", OCI=no_root)),
            *(create(agent_pb2.CreateContainerRequest(container_id=name, OCI=agent.spec()))
              for name in ("", ".", "..", "a/b", "../../x", "a\0b", "a\nb", "x" * 300)),
            execute(agent_pb2.ExecProcessRequest(container_id="box", exec_id="x")),
            execute(agent_pb2.ExecProcessRequest(container_id="box", exec_id="x", process=oci_pb2.Process())),
            container.exec(["a\0b"]),
            container.exec(["true"], cwd="relative"),
            container.exec([]),
        ]  # fmt: skip
        for request in requests:
            code, text = await refused(request)
            assert code is Code.INVALID_ARGUMENT, text
        huge = agent_pb2.ReadStreamRequest(**IDS, len=0xFFFFFFFF)
        process = await container.exec(["/bin/echo", "x"], exec_id="echo")
        huge.exec_id = "echo"
        assert (await client.rpc.ReadStdout(huge)).data == b"x\n"
        assert (await client.rpc.ReadStdout(agent_pb2.ReadStreamRequest(**IDS, len=0))).data == b""
        assert await process.wait() == 0


async def test_create_rejects_unsupported_fields(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        request = agent_pb2.CreateContainerRequest(container_id="box", OCI=agent.spec(), sandbox_pidns=True)
        assert (await refused(client.rpc.CreateContainer(request)))[0] is Code.UNIMPLEMENTED
        pid = agent.spec()
        pid.Linux.Namespaces.append(oci_pb2.LinuxNamespace(Type="pid"))
        code, text = await refused(client.create_container("box", pid))
        assert code is Code.FAILED_PRECONDITION
        assert text.startswith("Unexpected PID namespace received for container box")


async def test_several_are_removed_at_a_time(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        for number in range(5):
            await client.ensure_container(f"c{number}", agent.spec())
        began = time.monotonic()
        await asyncio.gather(*(client.container(f"c{number}").remove(timeout=20) for number in range(5)))
        assert time.monotonic() - began < 20


async def test_a_connection_of_neither_protocol_is_closed(agent: RunningAgent) -> None:
    reader, writer = await asyncio.open_unix_connection(agent.socket)
    writer.write(b"\x16\x03\x01")  # a TLS client hello
    with contextlib.suppress(ConnectionResetError):  # unread data causes a reset
        assert await reader.read() == b""
    writer.close()
    async with agent.connect() as client:
        assert await client.version()


def test_the_socket_is_for_its_owner_only(agent: RunningAgent) -> None:
    assert agent.socket.stat().st_mode & 0o777 == 0o600

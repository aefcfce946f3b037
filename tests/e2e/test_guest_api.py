"""Test methods about the guest itself, in a guest, where they may change what they are about."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator

import pytest

from caisson.agent.client import Agent, AgentError, default_spec
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.kata1 import agent_pb2, oci_pb2, types_pb2
from tests.e2e.conftest import ROOT, Caisson

pytestmark = [pytest.mark.root, pytest.mark.vm]


@pytest.fixture
async def client(vm: Caisson) -> AsyncIterator[Agent]:
    """Connect a client to the session's guest."""
    async with Agent.connect(vm.run_directory / "default/agent.sock") as client:
        yield client


async def test_the_network_of_a_guest_without_one(client: Agent) -> None:
    interfaces = (await client.rpc.ListInterfaces(agent_pb2.ListInterfacesRequest())).Interfaces
    (lo,) = interfaces
    assert (lo.name, lo.mtu) == ("lo", 65536)
    assert ("127.0.0.1", "8") in {(one.address, one.mask) for one in lo.IPAddresses}
    routes = agent_pb2.Routes(Routes=[types_pb2.Route(dest="192.0.2.0/24", device="lo", scope=253)])
    await client.rpc.UpdateRoutes(agent_pb2.UpdateRoutesRequest(routes=routes))
    listed = (await client.rpc.ListRoutes(agent_pb2.ListRoutesRequest())).Routes
    assert [(one.dest, one.device) for one in listed if one.dest.startswith("192.")] == [("192.0.2.0/24", "lo")]


async def test_the_clock_is_set(vm: Caisson, client: Agent) -> None:
    def guests_time() -> int:
        return int(vm("exec", "--", "date", "+%s").stdout)

    try:
        await client.rpc.SetGuestDateTime(agent_pb2.SetGuestDateTimeRequest(Sec=2_000_000_000, Usec=500_000))
        assert 2_000_000_000 <= guests_time() < 2_000_000_300
    finally:
        # What a supervisor calls after its host was suspended.
        socket = vm.run_directory / "default/agent.sock"
        command = sys.executable, "-m", "caisson.agent.client.identity", str(socket)
        program = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
        assert await program.wait() == 0
    began = time.time()
    assert began - 1 <= guests_time() <= time.time() + 1


async def test_random_numbers_are_reseeded(client: Agent) -> None:
    await client.rpc.ReseedRandomDev(agent_pb2.ReseedRandomDevRequest(data=bytes(range(256)) * 2))


async def test_nothing_is_plugged_in(client: Agent) -> None:
    await client.rpc.OnlineCPUMem(agent_pb2.OnlineCPUMemRequest(wait=True))
    await client.rpc.OnlineCPUMem(agent_pb2.OnlineCPUMemRequest(nb_cpus=1))  # responds at once, tries later
    with pytest.raises(AgentError) as caught:
        await client.rpc.OnlineCPUMem(agent_pb2.OnlineCPUMemRequest(wait=True, nb_cpus=1, cpu_only=True))
    assert (caught.value.code, caught.value.details) == (Code.INTERNAL, "only 0 of 1 were connected")
    details = await client.rpc.GetGuestDetails(
        agent_pb2.GuestDetailsRequest(mem_block_size=True, mem_hotplug_probe=True)
    )
    assert details.agent_details.init_daemon and details.agent_details.supports_seccomp


async def test_a_file_arrives(client: Agent) -> None:
    request = agent_pb2.CopyFileRequest(
        path="/run/caisson-e2e/file", file_size=3, file_mode=0o100644, dir_mode=0o755, data=b"abc"
    )
    await client.rpc.CopyFile(request)
    request.path = "/run/caisson-e2e/file/below"
    with pytest.raises(AgentError) as caught:
        await client.rpc.CopyFile(request)
    assert (caught.value.code, caught.value.details) == (
        Code.INTERNAL,
        "/run/caisson-e2e/file/below: Not a directory",
    )


async def test_a_container_with_a_profile_of_system_calls(vm: Caisson, client: Agent) -> None:
    root = vm.manifest("default")["containers"]["busybox"]
    spec = default_spec(root, ["/bin/sh", "-c", "grep Seccomp: /proc/self/status; mkdir /tmp/x"])
    rule = oci_pb2.LinuxSyscall(Names=["mkdir", "mkdirat"], Action="SCMP_ACT_ERRNO")
    spec.Linux.Seccomp.CopyFrom(oci_pb2.LinuxSeccomp(DefaultAction="SCMP_ACT_ALLOW", Syscalls=[rule]))
    await client.create_sandbox()
    container = await client.create_container("filtered", spec)
    try:
        await container.start()
        assert b"".join([data async for data in container.init().stdout()]) == b"Seccomp:\t2\n"
        assert b"Operation not permitted" in b"".join([data async for data in container.init().stderr()])
        assert await container.init().wait() == 1
    finally:
        await container.remove()

"""Test StartTracing in a guest whose image has the packages: spans arrive at the host's port."""

from __future__ import annotations

import pytest

from caisson.agent.client import Agent, AgentError
from caisson.proto.kata1 import agent_pb2
from tests.e2e.conftest import TIMEOUT, Caisson, built
from tests.native.test_tracing import receiver

pytestmark = [pytest.mark.root, pytest.mark.vm]


@pytest.mark.timeout(2 * TIMEOUT)
async def test_spans_arrive_at_the_hosts_port(own: Caisson) -> None:
    image = built("--template", "tracing")
    booted = own("boot-vm", "--image", str(image), "--detach")
    assert booted.returncode == 0, booted.stderr.decode()

    place = own.run_directory / "default"
    async with receiver(place / "vsock.sock_6831") as spans, Agent.connect(place / "agent.sock") as client:
        await client.rpc.StartTracing(agent_pb2.StartTracingRequest(), 120)
        await client.create_sandbox()
        await client.rpc.StopTracing(agent_pb2.StopTracingRequest(), 120)
        assert [(await spans.get())["name"] for _ in range(2)] == ["StartTracing", "CreateSandbox"]
    (place / "vsock.sock_6831").unlink(missing_ok=True)
    assert own("stop-vm").returncode == 0


async def test_a_guest_without_the_packages_says_so(vm: Caisson) -> None:
    async with Agent.connect(vm.run_directory / "default/agent.sock") as client:
        with pytest.raises(AgentError, match="the template `tracing` has them") as caught:
            await client.rpc.StartTracing(agent_pb2.StartTracingRequest())
        assert caught.value.code.name == "UNIMPLEMENTED"

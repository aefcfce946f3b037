"""Test a guest in which the agent is a systemd service."""

from __future__ import annotations

import asyncio
import socket

import pytest

from caisson.agent.client import Agent, default_spec
from caisson.proto.kata1 import agent_pb2, oci_pb2
from tests.e2e.conftest import TIMEOUT, Caisson, built
from tests.support.poll import wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm]


@pytest.mark.timeout(2 * TIMEOUT)
async def test_the_agent_as_a_service(own: Caisson) -> None:
    image = built("--template", "systemd")
    options = ["--append", "agent.log=debug agent.log_vport=1025"]
    booted = own("boot-vm", "--image", str(image), *options, "--detach")
    assert booted.returncode == 0, booted.stderr.decode()
    assert own.manifest("default")["init"] == "systemd"
    place = own.run_directory / "default"

    async with Agent.connect(place / "agent.sock") as agent:
        request = agent_pb2.GuestDetailsRequest(mem_block_size=True)
        assert not (await agent.rpc.GetGuestDetails(request)).agent_details.init_daemon
        await agent.create_sandbox()
        spec = default_spec(own.manifest("default")["containers"]["busybox"])
        spec.Linux.Resources.Pids.Limit = 7
        spec.Mounts.append(oci_pb2.Mount(destination="/sys/fs/cgroup", type="cgroup", source="cgroup"))
        container = await agent.create_container("box", spec)
        await container.start()
        process = await container.exec(["/bin/cat", "/sys/fs/cgroup/pids.max"])
        assert b"".join([data async for data in process.stdout()]) == b"7\n"
        stats = await agent.rpc.StatsContainer(agent_pb2.StatsContainerRequest(container_id="box"))
        assert stats.cgroup_stats.pids_stats.limit == 7
        await container.remove()
        await agent.destroy_sandbox()
        # The kernel's command line reaches an agent that is not process 1.
        with socket.socket(socket.AF_UNIX) as log:
            log.settimeout(60)
            log.connect(str(place / "vsock.sock"))
            log.sendall(b"CONNECT 1025\n")
            seen = b""
            while b"DestroySandbox" not in seen:
                data = await asyncio.to_thread(log.recv, 65536)
                assert data, seen
                seen += data
    assert own("stop-vm").returncode == 0


@pytest.mark.timeout(2 * TIMEOUT)
def test_a_guest_without_its_agent_ends(own: Caisson) -> None:
    image = built("--template", "systemd")
    options = ["--append", "agent.debug_console_vport=1026"]
    booted = own("boot-vm", "--image", str(image), *options, "--detach")
    assert booted.returncode == 0, booted.stderr.decode()
    with socket.socket(socket.AF_UNIX) as shell:
        shell.settimeout(60)
        shell.connect(str(own.run_directory / "default/vsock.sock"))
        shell.sendall(b"CONNECT 1026\n")
        shell.sendall(b"kill -9 $PPID\n")
        wait_until(lambda: not (own.run_directory / "default").exists(), "the VM ends", TIMEOUT)


def test_a_suite_with_an_older_systemd_is_refused(own: Caisson) -> None:
    refused = own("build-image", "--template", "systemd", "--suite", "bookworm")
    assert refused.returncode == 1
    assert b"'bookworm': unknown; known are: trixie" in refused.stderr

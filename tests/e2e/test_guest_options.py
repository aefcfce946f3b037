"""Test options on a guest's kernel command line."""

from __future__ import annotations

import asyncio
import json
import re
import socket

import pytest

from caisson.agent.client import Agent, AgentError, default_spec
from tests.e2e.conftest import Caisson

pytestmark = [pytest.mark.root, pytest.mark.vm]


def port(caisson: Caisson, name: str, number: int) -> socket.socket:
    """Connect to a port of the guest, with the hybrid vsock handshake."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(120)
    connection.connect(str(caisson.run_directory / name / "vsock.sock"))
    connection.sendall(f"CONNECT {number}\n".encode())
    answer = b""
    while not answer.endswith(b"\n"):
        answer += connection.recv(1)
    assert answer.startswith(b"OK "), answer
    return connection


def test_a_log_port_and_a_shell_in_the_guest(own: Caisson) -> None:
    words = "agent.log=debug agent.log_vport=1025 agent.debug_console_vport=1026 agent.frobnicate=1"
    booted = own("boot-vm", "--name", "open", "--detach", "--append", words)
    assert booted.returncode == 0, booted.stderr.decode()
    with port(own, "open", 1025) as log:
        seen = b""
        while b'"Check"' not in seen:  # boot-vm has called Health.Check
            seen += log.recv(4096)
        assert all("level" in json.loads(line) for line in seen.splitlines()[:-1])
    with port(own, "open", 1026) as shell:
        shell.sendall(b"echo pid-$$-; stty size; cat /proc/1/comm; echo end-$((1 + 1))\n")
        seen = b""
        while b"end-2" not in seen:
            seen += shell.recv(4096)
        assert re.search(rb"pid-\d+-", seen) and b"24 80" in seen
        shell.sendall(b"exit\n")
        while shell.recv(4096):
            pass
    assert "Unknown option agent.frobnicate" in (own.run_directory / "open/console.log").read_text()
    stopped = own("stop-vm", "--name", "open")
    assert stopped.returncode == 0, stopped.stderr.decode()


def test_a_profile_of_apparmor(own: Caisson) -> None:
    """Debian's kernel has AppArmor, and a guest uses it if enabled; only the empty profile is loaded here."""
    booted = own("boot-vm", "--name", "labels", "--detach", "--append", "lsm=apparmor apparmor=1")
    assert booted.returncode == 0, booted.stderr.decode()
    root = own.manifest("labels")["containers"]["busybox"]

    async def run(profile: str) -> bytes:
        spec = default_spec(root, ["/bin/cat", "/proc/self/attr/apparmor/current"])
        spec.Process.ApparmorProfile = profile
        async with Agent.connect(own.run_directory / "labels/agent.sock") as client:
            await client.create_sandbox()
            container = await client.create_container("labelled", spec)
            try:
                await container.start()
                return b"".join([data async for data in container.init().stdout()])
            finally:
                await container.remove()

    assert asyncio.run(run("unconfined")).strip() == b"unconfined"
    with pytest.raises(AgentError, match=r"label.*exec missing.*no such file"):
        asyncio.run(run("missing"))
    assert own("stop-vm", "--name", "labels").returncode == 0

"""Test what a container sees of the guest: only itself."""

from __future__ import annotations

import asyncio

import pytest

from caisson.agent import client
from tests.e2e.conftest import Caisson

pytestmark = pytest.mark.vm


def test_ps_shows_only_the_containers_own_processes(vm: Caisson) -> None:
    listed = vm("exec", "--", "ps", "-o", "pid,comm").stdout.decode().split("\n")
    names = {line.split()[1] for line in listed[1:] if line.strip()}
    assert listed[1].split() == ["1", "sh"]
    assert names <= {"sh", "sleep", "ps"}, listed


def test_the_root_is_the_containers_and_the_guests_is_out_of_reach(vm: Caisson) -> None:
    script = "ls /; ls /proc/1/root/; ls /..; readlink /proc/1/exe; cat /proc/self/mountinfo"
    seen = vm("exec", "--", "sh", "-c", script)
    assert seen.returncode == 0, seen.stderr
    assert b"/bin/busybox" in seen.stdout
    assert b"init\n" not in seen.stdout
    assert b"caisson" not in vm("exec", "--", "sh", "-c", "ls /usr /usr/lib 2>&1; cat /proc/1/cmdline").stdout


def test_the_containers_root_is_read_only_and_scratch_is_not(vm: Caisson) -> None:
    denied = vm("exec", "--", "touch", "/bin/x")
    assert denied.returncode == 1
    assert b"Read-only file system" in denied.stderr
    assert vm("exec", "--", "sh", "-c", "echo x >/tmp/x && cat /tmp/x").stdout == b"x\n"


async def guest_root(vm: Caisson, *words: str) -> tuple[int, bytes]:
    """Run a guest's own program in a container whose root is the guest's; return its status and errors."""
    spec = client.default_spec("/", words)
    spec.Root.Readonly = False
    del spec.Mounts[:]  # everything exists, and must not be mounted over
    async with client.Agent.connect(vm.run_directory / "default" / "agent.sock") as agent:
        await agent.create_sandbox()
        container = await agent.create_container("guest-root", spec)
        try:
            await container.start()
            output = b"".join([data async for data in container.init().stderr()])
            return await container.init().wait(), output
        finally:
            await container.remove()


def test_the_guests_root_is_read_only(vm: Caisson) -> None:
    busybox = vm.manifest("default")["containers"]["busybox"] + "/bin/busybox"
    status, errors = asyncio.run(guest_root(vm, busybox, "touch", "/usr/x"))
    assert status == 1
    assert b"Read-only file system" in errors


KNOCK = """
import socket, sys
for cid in (1, 2, 3, 0xFFFFFFFF):
    knocker = socket.socket(socket.AF_VSOCK)
    knocker.settimeout(10)
    try:
        knocker.connect((cid, 1024))
        knocker.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n")
        if knocker.recv(1):
            sys.exit(f"somebody answers at {cid}")
    except OSError as error:
        print(cid, error, file=sys.stderr)
"""


def test_a_container_cannot_drive_the_agent(vm: Caisson) -> None:  # CVE-2020-15257
    # vsock is not namespaced: only the agent itself can distinguish a container from the host.
    busybox = vm.manifest("default")["containers"]["busybox"] + "/bin/busybox"
    words = [busybox, "sh", "-c", 'exec /usr/bin/python3.* -IS -c "$0"', KNOCK]
    status, errors = asyncio.run(guest_root(vm, *words))
    assert status == 0, errors
    assert errors.count(b"\n") >= 1, errors


def test_two_containers_do_not_see_each_other(vm: Caisson) -> None:
    vm.make_containers("one", "two")
    assert vm("exec", "--container", "one", "--", "touch", "/tmp/mine").returncode == 0
    assert vm("exec", "--container", "two", "--", "ls", "/tmp").stdout == b""
    assert vm("exec", "--container", "one", "--", "ls", "/tmp").stdout == b"mine\n"

"""Test methods about the guest itself, as far as this machine can stand in for one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.kata1 import agent_pb2
from tests.native.agent_support import RunningAgent, refused
from tests.support.unique import unique

pytestmark = pytest.mark.root

#: Runs a command with an empty /run and its own mounts, as in a guest.
PRIVATE_RUN = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "sh")


async def test_files_come_in_pieces(agent: RunningAgent) -> None:
    path = Path("/run", unique("caisson-test"), "inner/file")
    content = os.urandom(2_500_000)

    try:
        async with agent.connect() as client:
            await client.version()  # connected
            fds = agent.fds()
            for offset in (2_000_000, 0, 1_000_000):
                assert not path.exists()
                request = agent_pb2.CopyFileRequest(
                    path=str(path),
                    file_size=len(content),
                    file_mode=0o100640,
                    dir_mode=0o750,
                    uid=7,
                    gid=8,
                    offset=offset,
                    data=content[offset : offset + 1_000_000],
                )
                await client.rpc.CopyFile(request)
            assert path.read_bytes() == content
            status = path.stat()
            assert (status.st_mode, status.st_uid, status.st_gid) == (0o100640, 7, 8)
            request.path = "/etc/passwd"
            assert await refused(client.rpc.CopyFile(request)) == (
                Code.UNKNOWN,
                "Only is possible to copy files into the /run directory",
            )
            assert agent.fds() == fds
    finally:
        path.unlink(missing_ok=True)
        for directory in (path.parent, path.parent.parent):
            if directory.is_dir():
                directory.rmdir()


async def test_name_servers(tmp_path: Path, nsexec_path: Path, busybox_rootfs: Path) -> None:
    own = Path("/etc/resolv.conf").read_bytes()
    agent = RunningAgent(tmp_path, nsexec_path, busybox_rootfs, within=PRIVATE_RUN)
    root = Path(f"/proc/{agent.process.pid}/root")
    seen, copies = root / "etc/resolv.conf", root / "run/kata-containers"

    try:
        async with agent.connect() as client:
            request = agent_pb2.CreateSandboxRequest(dns=[" nameserver 192.0.2.53 ", "search example.org"])
            for _ in range(2):
                await client.rpc.CreateSandbox(request)
                assert seen.read_text() == "nameserver 192.0.2.53\nsearch example.org\n"
                await client.destroy_sandbox()
                assert seen.read_bytes() == own
                assert not copies.exists()
    finally:
        agent.stop()
    assert Path("/etc/resolv.conf").read_bytes() == own


async def test_guest_methods_reject_malformed_requests(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        rpc = client.rpc
        for call, code, text in (
            (rpc.ReseedRandomDev(agent_pb2.ReseedRandomDevRequest()), Code.UNKNOWN, "missing entropy data"),
            (
                rpc.SetGuestDateTime(agent_pb2.SetGuestDateTimeRequest(Sec=1, Usec=1_000_000)),
                Code.INVALID_ARGUMENT,
                "Could not set guest time",
            ),
            (
                rpc.SetGuestDateTime(agent_pb2.SetGuestDateTimeRequest(Sec=1 << 62)),
                Code.INVALID_ARGUMENT,
                "Could not set guest time",
            ),
            (
                rpc.OnlineCPUMem(agent_pb2.OnlineCPUMemRequest(wait=True, cpu_only=True)),
                Code.UNKNOWN,
                "requested number of CPUs '0' must be greater than 0",
            ),
            (
                rpc.MemHotplugByProbe(agent_pb2.MemHotplugByProbeRequest(memHotplugProbeAddr=[1])),
                Code.INTERNAL,
                "Could not probe memory at 0x1",
            ),
        ):
            found, message = await refused(call)
            assert (found, message[: len(text)]) == (code, text)

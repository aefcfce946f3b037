"""Test mounting file systems in running containers: tmpfs, which needs no host."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from caisson.agent.client import Agent
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.caisson import caisson_pb2
from tests.native.agent_support import RunningAgent, output, refused, sh

pytestmark = pytest.mark.root


async def mount(client: Agent, mount_point: str, *options: str, container_id: str = "box", **fields: str) -> None:
    fields = {"source": "scratch", "fstype": "tmpfs"} | fields
    await client.guest.Mount(
        caisson_pb2.MountRequest(container_id=container_id, mount_point=mount_point, options=options, **fields)
    )


async def unmount(client: Agent, source: str = "scratch") -> None:
    await client.guest.Unmount(caisson_pb2.UnmountRequest(source=source))


async def said(client: Agent, script: str, container_id: str = "box") -> str:
    process = await sh(client.container(container_id), script)
    text = (await output(process)).decode()
    assert await process.wait() == 0
    return text


async def test_it_is_there_for_all_processes_and_gone_again(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        for name in ("box", "other"):
            await client.ensure_container(name, agent.spec())
        await mount(client, "/run/deep/scratch", "size=64k", "mode=0700")
        await said(client, "echo written > /run/deep/scratch/file")
        assert await said(client, "cat /run/deep/scratch/file") == "written\n"
        (line,) = (await said(client, "grep /run/deep/scratch /proc/self/mounts")).splitlines()
        assert {"rw", "nosuid", "nodev", "size=64k", "mode=700"} <= set(line.split()[3].split(","))
        assert "scratch" not in await said(client, "cat /proc/self/mounts", "other")

        await mount(client, "/tmp/ro", "ro", source="sealed")
        assert await said(client, "touch /tmp/ro/x 2>&1 || true") == "touch: /tmp/ro/x: Read-only file system\n"

        await mount(client, "/tmp/again")
        await unmount(client)
        assert await said(client, "grep -c scratch /proc/self/mounts || true") == "0\n"
        assert "sealed" in await said(client, "cat /proc/self/mounts")
        await unmount(client)  # nothing is mounted

        await mount(client, "/tmp/again")
        await mount(client, "/tmp/again", container_id="other")
        await asyncio.gather(unmount(client), unmount(client))
        assert await said(client, "grep -c scratch /proc/self/mounts || true", "other") == "0\n"

        await mount(client, "/tmp/again")
        await client.container("box").remove()
        await unmount(client)  # gone with its container


async def test_a_link_inside_leads_nowhere(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        await client.ensure_container("box", agent.spec())
        await said(client, "mkdir /tmp/real; ln -s /tmp/real /tmp/link")
        for path in ("/tmp/link", "/tmp/link/deep", "/tmp/real/../x", "relative"):
            code, text = await refused(mount(client, path))
            assert (code, path in text) == (Code.INTERNAL, True)
        assert await said(client, "ls /tmp/real") == ""


@pytest.mark.parametrize(
    ("fields", "code", "why"),
    [
        ({"fstype": "ext4"}, Code.INVALID_ARGUMENT, "virtiofs, 9p, tmpfs"),
        ({"container_id": "nobody"}, Code.NOT_FOUND, "nobody"),
        ({"mount_point": "/sys/x"}, Code.INTERNAL, "/sys/x of box"),
        ({"mount_point": "/etc/x"}, Code.INTERNAL, "read-only file system"),
    ],
)
async def test_mount_rejects_malformed_requests(
    agent: RunningAgent, fields: dict[str, Any], code: Code, why: str
) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        await client.ensure_container("box", agent.spec())
        fds = agent.fds()
        found, text = await refused(mount(client, **{"mount_point": "/tmp/x"} | fields))
        assert (found, why in text) == (code, True), text
        assert agent.fds() == fds


async def test_an_option_that_is_none_and_a_container_that_has_ended(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        container = await client.ensure_container("box", agent.spec("/bin/true"))
        await container.init().wait()
        code, text = await refused(mount(client, "/tmp/x"))
        assert (code, text) == (Code.UNKNOWN, "container not running")
        await client.ensure_container("other", agent.spec())
        code, text = await refused(mount(client, "/tmp/x", "nonsense=1", container_id="other"))
        assert (code, text) == (Code.INTERNAL, "Could not mount scratch: invalid argument")


def test_a_thread_in_a_container_imports_nothing() -> None:
    """A fresh interpreter has imported everything that the thread calls before it enters the container."""
    program = """if True:
        import os, sys, threading
        from caisson.agent.model import container_mounts
        from caisson.agent.guest.storage import open_point

        class Watch:
            seen = []
            def find_spec(self, name, path, target=None):
                if threading.current_thread() is not threading.main_thread():
                    self.seen.append(name)

        def work():
            os.close(open_point("/run/caisson-test/a/b", 0o755))
            raise KeyError("handed out")

        container_mounts._namespace = lambda container: os.open("/proc/self/ns/mnt", os.O_RDONLY)
        sys.meta_path.insert(0, Watch())
        try:
            container_mounts._inside(None, work)
        except KeyError as error:
            print("raised", error, Watch.seen)
    """
    words = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "sh", sys.executable, "-c"]
    done = subprocess.run([*words, program], capture_output=True, text=True)
    assert done.stdout == "raised 'handed out' []\n", done.stderr

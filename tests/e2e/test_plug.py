"""Test CPUs and memory hot-plugged into a running guest, and a host directory that it mounts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from caisson.agent.client import Agent, default_spec
from caisson.image.vm import find_vm
from caisson.image.vm.errors import VMError
from caisson.image.vm.hotplug.resources import plug_cpus, plug_memory
from caisson.proto.kata1 import agent_pb2, oci_pb2
from tests.e2e.conftest import COMPILE_TIMEOUT, TIMEOUT, Caisson, built

pytestmark = [pytest.mark.root, pytest.mark.vm]
SHARED = "/run/kata-containers/shared/containers"


@pytest.mark.timeout(2 * TIMEOUT)
async def test_cpus_and_memory(own: Caisson, monkeypatch: pytest.MonkeyPatch) -> None:
    # bookworm's kernel: newer ones do not see hot-plugged CPUs under emulation.
    image = built("--suite", "bookworm")
    booted = own("boot-vm", "--image", str(image), "--max-cpus", "3", "--max-memory", "1024", "--detach")
    assert booted.returncode == 0, booted.stderr.decode()
    monkeypatch.setenv("CAISSON_RUN", str(own.run_directory))
    machine = find_vm("default")
    assert machine is not None

    async with Agent.connect(machine.agent_socket) as agent:
        await agent.create_sandbox()
        spec = default_spec(own.manifest("default")["containers"]["busybox"])
        container = await agent.create_container("c", spec)
        await container.start()

        async def sh(script: str) -> str:
            process = await container.exec(["/bin/sh", "-c", script], env=["PATH=/bin"])
            return b"".join([data async for data in process.stdout()]).decode().strip()

        async def memory() -> int:
            return int((await sh("grep MemTotal /proc/meminfo")).split()[1]) // 1024

        assert await sh("nproc") == "1"
        before = await memory()
        waiting = asyncio.ensure_future(agent.rpc.OnlineCPUMem(agent_pb2.OnlineCPUMemRequest(wait=True, nb_cpus=2), 60))
        await agent.version()  # by now it waits for them
        await asyncio.to_thread(plug_memory, machine, 256)
        await asyncio.to_thread(plug_cpus, machine, 2)
        await waiting
        assert await sh("nproc") == "3"
        assert await memory() > before + 200
        with pytest.raises(VMError, match=r"room for 0 more CPUs, not 1; .*--max-cpus"):
            await asyncio.to_thread(plug_cpus, machine, 1)
        with pytest.raises(VMError, match=r"has 768 MiB and can have 1024; .*--max-memory"):
            await asyncio.to_thread(plug_memory, machine, 512)
        # Our vsock device maps the added memory, and continues.
        assert await sh("head -c 300000000 /dev/zero | tail -c 300000000 | wc -c") == "300000000"
    assert own("stop-vm").returncode == 0


@pytest.mark.timeout(COMPILE_TIMEOUT)
async def test_a_share_by_9p(own: Caisson, lean: Path, tmp_path: Path) -> None:
    (tmp_path / "hello").write_text("from the host\n")
    share, out = f"data={tmp_path}", tmp_path / "out"
    out.mkdir()
    booted = own("boot-vm", "--image", str(lean), "--share", share, "--share", f"out={out}:rw", "--detach")
    assert booted.returncode == 0, booted.stderr.decode()

    def storage(tag: str, *options: str) -> agent_pb2.Storage:
        words = ["trans=virtio", "version=9p2000.L", "cache=mmap", *options]
        return agent_pb2.Storage(driver="9p", source=tag, fstype="9p", mount_point=f"{SHARED}/{tag}", options=words)

    async with Agent.connect(own.run_directory / "default/agent.sock") as agent:
        # One for the whole sandbox, one for the container.
        await agent.rpc.CreateSandbox(agent_pb2.CreateSandboxRequest(storages=[storage("data", "ro")]))
        spec = default_spec(
            own.manifest("default")["containers"]["busybox"],
            ["/bin/sh", "-c", "cat /mnt/hello; echo from the guest >/home/reply; touch /mnt/x"],
        )
        for tag, place in (("data", "/mnt"), ("out", "/home")):
            mount = oci_pb2.Mount(destination=place, source=f"{SHARED}/{tag}", type="bind", options=["rbind"])
            spec.Mounts.append(mount)
        request = agent_pb2.CreateContainerRequest(container_id="c", OCI=spec, storages=[storage("out")])
        await agent.rpc.CreateContainer(request)
        container = agent.container("c")
        await container.start()
        assert b"".join([data async for data in container.init().stdout()]) == b"from the host\n"
        assert b"Read-only file system" in b"".join([data async for data in container.init().stderr()])
        await container.remove()
    assert (out / "reply").read_text() == "from the guest\n"
    assert not (tmp_path / "x").exists()

    # And for users: the boot-time share is mounted, if it could not be hot-plugged.
    placed = own("share", str(out), "--writable", "--at", "/home/out")
    assert (placed.returncode, placed.stdout) == (0, b"/home/out\n"), placed.stderr.decode()
    assert (
        own("exec", "--", "sh", "-c", "cat /home/out/reply; echo again >/home/out/reply").stdout == b"from the guest\n"
    )
    assert (out / "reply").read_text() == "again\n"
    kept = own("unshare", "out")
    assert kept.returncode == 1 and b"stays until it stops" in kept.stderr
    assert b"9p" not in own("exec", "--", "cat", "/proc/self/mounts").stdout
    assert own("stop-vm").returncode == 0


def test_a_share_that_is_none(own: Caisson, tmp_path: Path) -> None:
    for text, words in (
        (f"a={tmp_path}/no", "is not a directory"),
        ("a", "is not TAG=DIR"),
        (f"a/b={tmp_path}", "is not a tag"),
    ):
        refused = own("boot-vm", "--share", text)
        assert refused.returncode == 2
        assert words in refused.stderr.decode()

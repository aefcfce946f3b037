"""Test disks and interfaces that are hot-plugged into a running guest, with QEMU's monitor, and used."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.client import Agent, AgentError, default_spec
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.image.vm.qmp import QMP
from caisson.proto.kata1 import agent_pb2, oci_pb2, types_pb2
from tests.e2e.conftest import Caisson

pytestmark = [pytest.mark.root, pytest.mark.vm]
MOUNT_POINT = "/run/kata-containers/shared/containers/disk"


def disk(directory: Path) -> Path:
    """Provide a file system containing a file."""
    (directory / "tree").mkdir()
    (directory / "tree/hello").write_text("from the host\n")
    image = directory / "disk.img"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", directory / "tree", image, "4M"], check=True)
    return image


def plug(vm: Caisson, image: Path) -> None:
    with QMP(vm.run_directory / "plug/qmp.sock", 30) as monitor:
        file = {"driver": "file", "filename": str(image)}
        monitor.execute("blockdev-add", {"driver": "raw", "node-name": "disk", "read-only": True, "file": file})
        monitor.execute("device_add", {"driver": "virtio-blk-pci", "id": "d", "drive": "disk", "bus": "port0"})


def storage(slot: str) -> Any:
    return agent_pb2.Storage(
        driver="blk", source=f"{slot}/00", fstype="ext4", mount_point=MOUNT_POINT, options=["ro", "noload"]
    )


async def test_a_disk(own: Caisson, tmp_path: Path) -> None:
    booted = own("boot-vm", "--name", "plug", "--detach", "--append", "agent.hotplug_timeout=60s")
    assert booted.returncode == 0, booted.stderr.decode()
    root = own.manifest("plug")["containers"]["busybox"]
    image = disk(tmp_path)

    def spec() -> Any:
        made = default_spec(root, ["/bin/sh", "-c", "cat /mnt/hello; touch /mnt/x"])
        made.Mounts.append(oci_pb2.Mount(destination="/mnt", source=MOUNT_POINT, type="bind", options=["rbind"]))
        return made

    async def create(client: Agent) -> None:
        request = agent_pb2.CreateContainerRequest(container_id="c", OCI=spec(), storages=[storage("10")])
        await client.rpc.CreateContainer(request, 120)

    async with Agent.connect(own.run_directory / "plug/agent.sock") as client:
        await client.create_sandbox()
        creating = asyncio.ensure_future(create(client))
        await client.version()  # by now it waits
        await asyncio.to_thread(plug, own, image)
        await creating
        for _ in range(2):  # the disk arrives while awaited, and is there beforehand
            container = client.container("c")
            await container.start()
            assert b"".join([data async for data in container.init().stdout()]) == b"from the host\n"
            assert b"Read-only file system" in b"".join([data async for data in container.init().stderr()])
            await container.remove()
            await create(client)
        await client.container("c").remove()

        # The same disk as a device, with different numbers on the host.
        made = default_spec(root, ["/bin/sh", "-c", "grep -c 'from the host' /dev/data; : >/dev/data"])
        made.Linux.Devices.append(oci_pb2.LinuxDevice(Path="/dev/data", Type="b", Major=99, Minor=7))
        made.Linux.Resources.Devices.append(
            oci_pb2.LinuxDeviceCgroup(Allow=True, Type="b", Major=99, Minor=7, Access="r")
        )
        request = agent_pb2.CreateContainerRequest(container_id="d", OCI=made)
        request.devices.append(agent_pb2.Device(id="10/00", type="blk", container_path="/dev/data"))
        await client.rpc.CreateContainer(request, 120)
        container = client.container("d")
        await container.start()
        assert b"".join([data async for data in container.init().stdout()]) == b"1\n"
        assert b"Operation not permitted" in b"".join([data async for data in container.init().stderr()])
        await container.remove()
    assert own("stop-vm", "--name", "plug").returncode == 0


async def test_an_interface(own: Caisson) -> None:
    booted = own("boot-vm", "--name", "plug", "--detach", "--append", "agent.hotplug_timeout=60s")
    assert booted.returncode == 0, booted.stderr.decode()
    mac = "52:54:00:00:00:77"

    def plug_in() -> None:
        with QMP(own.run_directory / "plug/qmp.sock", 30) as monitor:
            monitor.execute("netdev_add", {"type": "user", "id": "n", "restrict": True})
            interface = {"driver": "virtio-net-pci", "id": "i", "netdev": "n", "mac": mac}
            monitor.execute("device_add", interface | {"bus": "port1", "romfile": ""})

    async with Agent.connect(own.run_directory / "plug/agent.sock") as client:
        address = types_pb2.IPAddress(address="10.0.2.15", mask="24")
        wanted = types_pb2.Interface(name="eth0", hwAddr=mac, mtu=1500, IPAddresses=[address], pciPath="11/00")
        call = asyncio.ensure_future(
            client.rpc.UpdateInterface(agent_pb2.UpdateInterfaceRequest(interface=wanted), 120)
        )
        await client.version()
        await asyncio.to_thread(plug_in)
        assert (await call).name == "eth0"
        route = types_pb2.Route(gateway="10.0.2.2", device="eth0")
        await client.rpc.UpdateRoutes(agent_pb2.UpdateRoutesRequest(routes=agent_pb2.Routes(Routes=[route])))
        await client.create_sandbox()
        root = own.manifest("plug")["containers"]["busybox"]
        spec = default_spec(root, ["/bin/ping", "-c", "1", "-W", "30", "10.0.2.2"])
        container = await client.create_container("net", spec)
        await container.start()
        said = b"".join([data async for data in container.init().stdout()])
    assert b"1 packets received" in said
    assert own("stop-vm", "--name", "plug").returncode == 0


async def test_a_disk_that_does_not_come(vm: Caisson) -> None:
    async with Agent.connect(vm.run_directory / "default/agent.sock") as client:
        await client.create_sandbox()
        spec = default_spec(vm.manifest("default")["containers"]["busybox"], ["/bin/true"])
        request = agent_pb2.CreateContainerRequest(container_id="late", OCI=spec, storages=[storage("11")])
        with pytest.raises(AgentError) as caught:
            await client.rpc.CreateContainer(request, 60)
        assert (caught.value.code, caught.value.details) == (
            Code.DEADLINE_EXCEEDED,
            "Timeout reached after 3s waiting for device 11/00",
        )
        loaded = agent_pb2.CreateSandboxRequest(kernel_modules=[agent_pb2.KernelModule(name="no-such-module")])
        await client.destroy_sandbox()
        with pytest.raises(AgentError, match="could not load module: no-such-module"):
            await client.rpc.CreateSandbox(loaded)
        loaded.kernel_modules[0].name = "erofs"
        await client.rpc.CreateSandbox(loaded)

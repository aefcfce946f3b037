"""Test the Sandbox service as containerd 2.x calls it with `sandboxer = "shim"`: the pod before its containers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.client import Client, Stub
from caisson.agent.rpc.ttrpc.responses import RpcError
from caisson.agent.shim.sandbox import document_of, write_files
from caisson.proto.containerd import bootstrap_pb2, cri_pb2, sandbox_pb2
from tests.native.nsexec_support import make_rootfs
from tests.shim.fake_containerd import NAMESPACE, FakeContainerd, Task
from tests.support.poll import until

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

POD = "p1"
CONFIG = cri_pb2.PodSandboxConfig(
    hostname="hh",
    dns_config=cri_pb2.DNSConfig(servers=["10.0.0.10"], searches=["svc.local"], options=["ndots:5"]),
    linux=cri_pb2.LinuxPodSandboxConfig(
        sysctls={"kernel.shm_rmid_forced": "1"},
        resources=cri_pb2.LinuxContainerResources(cpu_quota=150_000, cpu_period=100_000, memory_limit_in_bytes=1 << 30),
    ),
)


def request_of(config: cri_pb2.PodSandboxConfig, bundle: Path) -> Any:
    request = sandbox_pb2.CreateSandboxRequest(sandbox_id=POD, bundle_path=str(bundle))
    request.options.type_url, request.options.value = "runtime.v1.PodSandboxConfig", config.SerializeToString()
    return request


async def connected(fake: FakeContainerd) -> tuple[Any, str, Client, Path]:
    """Start the shim for a sandbox, whose bundle has no configuration."""
    bundle = fake.bundle(POD, {})
    (bundle / "config.json").unlink()
    parameters = bootstrap_pb2.BootstrapParams(instance_id=POD, namespace=NAMESPACE).SerializeToString()
    address = (await fake.run_shim(bundle, "start", stdin=parameters)).decode().split('"')[5]
    client = await Client.connect(address.removeprefix("unix://"))
    return Stub(client, sandbox_pb2.DESCRIPTOR.services_by_name["Sandbox"]), address, client, bundle


async def test_a_sandbox_outlives_its_containers(fake: FakeContainerd, tmp_path: Path) -> None:
    fake.rootfs = make_rootfs(tmp_path / "rootfs")
    for name in ("hostname", "hosts", "resolv.conf"):
        (fake.rootfs / "etc" / name).touch()  # mount points, because this root is mounted read-only
    rpc, address, client, bundle = await connected(fake)
    await rpc.CreateSandbox(request_of(CONFIG, bundle))
    started = await rpc.StartSandbox(sandbox_pb2.StartSandboxRequest(sandbox_id=POD))
    assert Path(f"/proc/{started.pid}/ns/net").exists() and started.created_at.seconds
    assert list(Path(f"/proc/{started.pid}/root").iterdir()) == [], "nothing of the host"
    platform = (await rpc.Platform(sandbox_pb2.PlatformRequest(sandbox_id=POD))).platform
    assert (platform.os, bool(platform.architecture)) == ("linux", True)
    status = await rpc.SandboxStatus(sandbox_pb2.SandboxStatusRequest(sandbox_id=POD))
    assert (status.state, status.pid) == ("SANDBOX_READY", started.pid)
    await rpc.PingSandbox(sandbox_pb2.PingRequest(sandbox_id=POD))
    waiting = asyncio.ensure_future(rpc.WaitSandbox(sandbox_pb2.WaitSandboxRequest(sandbox_id=POD)))
    for name in ("c1", "c2"):  # containers use the sandbox's connection, without a `start` of their own
        spec = fake.spec("sh", "-c", "grep -q 10.0.0.10 /etc/resolv.conf && exit 3")
        container = Task(fake, fake.bundle(name, spec), address, client, 3)
        await container.create()
        await container.call("Start")
        assert (await container.call("Wait")).exit_status == 3, "its resolv.conf must be the sandbox's"
        await container.call("Delete")
        await container.call("Shutdown")
        assert (await rpc.SandboxStatus(sandbox_pb2.SandboxStatusRequest(sandbox_id=POD))).state == "SANDBOX_READY"
    await rpc.StopSandbox(sandbox_pb2.StopSandboxRequest(sandbox_id=POD))
    assert (await waiting).exited_at.seconds
    status = await rpc.SandboxStatus(sandbox_pb2.SandboxStatusRequest(sandbox_id=POD))
    assert status.state == "SANDBOX_NOTREADY"
    with pytest.raises(RpcError) as error:
        await rpc.PingSandbox(sandbox_pb2.PingRequest(sandbox_id=POD))
    assert error.value.code == StatusCode.UNAVAILABLE
    await rpc.ShutdownSandbox(sandbox_pb2.ShutdownSandboxRequest(sandbox_id=POD))
    await until(lambda: not Path(address.removeprefix("unix://")).exists(), "the socket's end")
    await client.close()


async def test_unknown_sandboxes_are_refused(fake: FakeContainerd) -> None:
    rpc, _, client, bundle = await connected(fake)
    for method, request in (
        ("StartSandbox", sandbox_pb2.StartSandboxRequest(sandbox_id=POD)),
        ("SandboxStatus", sandbox_pb2.SandboxStatusRequest(sandbox_id=POD)),
    ):
        with pytest.raises(RpcError) as error:
            await getattr(rpc, method)(request)
        assert error.value.code == StatusCode.NOT_FOUND
    await rpc.CreateSandbox(request_of(CONFIG, bundle))
    with pytest.raises(RpcError) as error:
        await rpc.CreateSandbox(request_of(CONFIG, bundle))
    assert error.value.code == StatusCode.ALREADY_EXISTS
    await rpc.ShutdownSandbox(sandbox_pb2.ShutdownSandboxRequest(sandbox_id=POD))
    await client.close()


def test_a_sandboxs_configuration_has_what_a_pause_containers_has() -> None:
    request = request_of(CONFIG, Path("/b"))
    request.netns_path = "/run/netns/x"
    document = document_of(request, CONFIG)
    assert document["hostname"] == "hh"
    assert document["linux"]["namespaces"][0] == {"type": "network", "path": "/run/netns/x"}
    assert document["linux"]["resources"]["memory"] == {"limit": 1 << 30}
    assert document["linux"]["sysctl"] == {"kernel.shm_rmid_forced": "1"}


def test_files_of_a_sandbox_are_what_the_kubelet_says(tmp_path: Path) -> None:
    mounts = {mount["destination"]: Path(mount["source"]) for mount in write_files(tmp_path, CONFIG)}
    assert mounts["/etc/resolv.conf"].read_text() == "search svc.local\nnameserver 10.0.0.10\noptions ndots:5\n"
    assert mounts["/etc/hostname"].read_text() == "hh\n"
    hosts = Path("/etc/hosts")  # missing on a bare machine
    assert mounts["/etc/hosts"].read_text() == hosts.read_text() if hosts.exists() else "/etc/hosts" not in mounts

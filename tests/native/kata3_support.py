"""Play a Kata 3.x host for tests: typed calls over ttrpc, to an agent with its own /run/kata-containers."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.client import Client, Stub
from caisson.agent.rpc.ttrpc.responses import RpcError
from caisson.proto.kata3 import agent_pb2, health_pb2, oci_pb2
from tests.native.agent_support import RunningAgent

#: In its own mount and network namespaces.
APART = (
    "unshare", "--mount", "--net", "sh", "-c",
    'mkdir -p /run/kata-containers && mount -t tmpfs tmpfs /run/kata-containers && exec "$@"', "sh",
)  # fmt: skip
SHARED = "/run/kata-containers/shared/containers"

#: A pod's shared memory, as requested by a shim.
SHM = agent_pb2.Storage(
    driver="ephemeral",
    source="shm",
    fstype="tmpfs",
    options=["noexec", "nosuid", "nodev", "mode=1777", "size=67108864"],
    mount_point="/run/kata-containers/sandbox/shm",
)


CONTAINERDS_MOUNTS = (
    ("/dev", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
    ("/dev/pts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
    ("/dev/mqueue", "mqueue", "nosuid,noexec,nodev"),
    ("/sys", "sysfs", "nosuid,noexec,nodev,ro"),
    ("/sys/fs/cgroup", "cgroup", "nosuid,noexec,nodev,relatime,ro"),
)


class Host:
    """One connection; ``rpc`` has every method by name."""

    def __init__(self, client: Client, rootfs: Path | str) -> None:
        self._client = client
        self._rootfs = rootfs
        self.rpc: Any = Stub(client, agent_pb2.DESCRIPTOR.services_by_name["AgentService"])
        self.health: Any = Stub(client, health_pb2.DESCRIPTOR.services_by_name["Health"])

    @classmethod
    async def connect(cls, agent: RunningAgent) -> Host:
        return cls(await Client.connect(agent.socket), agent.rootfs)

    async def __aenter__(self) -> Host:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    def spec(self, *args: str, **fields: Any) -> oci_pb2.Spec:
        """Return the minimal spec that runs: a busybox root, and what every container has."""
        mounts = [oci_pb2.Mount(destination="/proc", type="proc", source="proc")]
        return oci_pb2.Spec(
            Version="1.2.0",
            Root=oci_pb2.Root(Path=fields.pop("root", str(self._rootfs)), Readonly=fields.pop("readonly", True)),
            Mounts=[*mounts, *fields.pop("mounts", [])],
            Process=oci_pb2.Process(
                Args=args or ["/bin/sleep", "1000"], Env=["PATH=/bin"], Cwd="/", **fields.pop("process", {})
            ),
            Linux=oci_pb2.Linux(Namespaces=[oci_pb2.LinuxNamespace(Type="mount")]),
            **fields,
        )

    def containerds_spec(self, *args: str, **fields: Any) -> oci_pb2.Spec:
        """Return a spec as containerd's CRI creates it and Kata's shim forwards it, without limits and host paths."""
        mounts = [
            oci_pb2.Mount(destination=where, type=kind, source=kind, options=options.split(","))
            for where, kind, options in CONTAINERDS_MOUNTS
        ]
        spec = self.spec(*args, mounts=[*mounts, *fields.pop("mounts", [])], **fields)
        spec.Annotations["io.kubernetes.cri.container-type"] = "sandbox"
        spec.Process.ApparmorProfile = "cri-containerd.apparmor.d"
        spec.Process.OOMScoreAdj = 500
        spec.Process.NoNewPrivileges = True
        spec.Process.Rlimits.add(Type="RLIMIT_NOFILE", Hard=1024, Soft=1024)
        capabilities = ["CAP_CHOWN", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"]
        for name in ("Bounding", "Effective", "Permitted"):
            getattr(spec.Process.Capabilities, name).extend(capabilities)
        spec.Linux.Sysctl.update({"net.ipv4.ip_unprivileged_port_start": "0", "kernel.shm_rmid_forced": "1"})
        spec.Linux.CgroupsPath = f"/kubepods/burstable/pod{uuid.uuid4()}/{uuid.uuid4().hex}"
        del spec.Linux.Namespaces[:]
        for kind in ("ipc", "uts", "mount"):
            spec.Linux.Namespaces.add(Type=kind)
        spec.Linux.MaskedPaths.extend(["/proc/acpi", "/proc/kcore", "/proc/keys", "/sys/firmware"])
        spec.Linux.ReadonlyPaths.extend(["/proc/bus", "/proc/sys"])
        return spec

    async def create(self, container_id: str, spec: oci_pb2.Spec | None = None, **fields: Any) -> None:
        request = agent_pb2.CreateContainerRequest(
            container_id=container_id, exec_id=container_id, OCI=spec or self.spec(), **fields
        )
        await self.rpc.CreateContainer(request)

    async def run(self, container_id: str, spec: oci_pb2.Spec | None = None, **fields: Any) -> None:
        await self.create(container_id, spec, **fields)
        await self.rpc.StartContainer(agent_pb2.StartContainerRequest(container_id=container_id))

    async def remove(self, container_id: str) -> None:
        await self.rpc.RemoveContainer(agent_pb2.RemoveContainerRequest(container_id=container_id))

    async def sh(self, container_id: str, script: str) -> str:
        """Return the output of a shell script in a container."""
        exec_id = uuid.uuid4().hex
        process = oci_pb2.Process(Args=["/bin/sh", "-c", script], Env=["PATH=/bin"], Cwd="/")
        request = agent_pb2.ExecProcessRequest(container_id=container_id, exec_id=exec_id, process=process)
        await self.rpc.ExecProcess(request)
        return (await self.output(container_id, exec_id)).decode()

    async def output(self, container_id: str, exec_id: str = "") -> bytes:
        """Return all of a process's standard output, up to the empty response."""
        request = agent_pb2.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=32 << 10)
        pieces = []
        while data := (await self.rpc.ReadStdout(request)).data:
            pieces.append(data)
        return b"".join(pieces)


async def refused(call: Any) -> tuple[StatusCode, str]:
    """Return the status and text of a call that must fail."""
    try:
        await call
    except RpcError as error:
        return error.code, error.text
    raise AssertionError("the call should have failed")


@pytest.fixture
def apart(tmp_path: Path, nsexec_path: Path, busybox_rootfs: Path) -> Iterator[RunningAgent]:
    """Start an agent with its own mounts and network; it ends with its sandbox, or on request."""
    running = RunningAgent(tmp_path, nsexec_path, busybox_rootfs, "--hotplug-timeout=100ms", within=APART)
    yield running
    running.stop()
    assert list(running.state.rglob("*")) == []
    assert running.cgroups() == []
    assert "a bug in a handler" not in running.log.read_text()


def inside(agent: RunningAgent, path: str) -> Path:
    """Return a path as the agent sees it."""
    return Path(f"/proc/{agent.pid}/root{path}")


def mounts(agent: RunningAgent, path: str) -> list[str]:
    """Return the types and options of mounts on one of the agent's paths."""
    found = []
    for line in Path(f"/proc/{agent.pid}/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[4] == path:
            found.append(" ".join([after.split()[0], before.split()[5], after.split()[2]]))
    return found

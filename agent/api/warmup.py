"""Warm up a guest that is to be saved: start and end a pod with one container.

The first container finds kernel modules missing, caches empty and byte code not specialized.  Once that is done, it is
part of the snapshot, and no clone has to repeat it.
"""

from __future__ import annotations

import asyncio
import os
import time
from socket import socket
from typing import Any

from caisson.agent.guest import modules
from caisson.agent.rpc.ttrpc.client import Client, Stub
from caisson.proto.caisson import caisson_pb2
from caisson.proto.contract import GUEST_SHM
from caisson.proto.kata3 import agent_pb2, oci_pb2

#: What a pod's devices and containers need.
MODULES = ("virtiofs", "virtio_net", "bridge")

#: Seconds for each call, in an emulated guest on a busy machine.
TIMEOUT = 60.0

#: The container and its places in the guest.
ID = "warm-up"
ROOT = f"/run/kata-containers/{ID}"

CAPABILITIES = ("CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETUID")
NAMESPACES = ("mount", "uts", "ipc", "cgroup")
ARCHITECTURES = {"x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32")}

MOUNTS = (
    ("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
    ("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    ("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")),
    ("/dev/shm", "bind", GUEST_SHM, ("rbind",)),
    ("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
    ("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
    ("/sys/fs/cgroup", "cgroup", "cgroup", ("ro", "nosuid", "noexec", "nodev")),
)


async def warm_up(connected: socket, program: str) -> None:
    """Start and end a pod over a connection to this guest's agent; its container runs a static ``program``.

    Raises RpcError, ConnectionClosed or ModuleNotLoaded.
    """
    modules.load_available(MODULES)
    async with await Client.over(connected) as client:
        agent = Stub(client, agent_pb2.DESCRIPTOR.services_by_name["AgentService"])
        guest = Stub(client, caisson_pb2.DESCRIPTOR.services_by_name["Guest"])
        try:
            await _run(agent, program)
        finally:
            await guest.DestroySandbox(caisson_pb2.DestroySandboxRequest(), timeout=TIMEOUT)


async def _run(agent: Any, program: str) -> None:
    now = time.time_ns()
    clock = agent_pb2.SetGuestDateTimeRequest(Sec=now // 10**9, Usec=now % 10**9 // 1000)
    shm = _tmpfs(GUEST_SHM, "noexec", "nosuid", "nodev", "mode=1777")
    await asyncio.gather(
        agent.ReseedRandomDev(agent_pb2.ReseedRandomDevRequest(data=os.urandom(64)), timeout=TIMEOUT),
        agent.SetGuestDateTime(clock, timeout=TIMEOUT),
        agent.CreateSandbox(
            agent_pb2.CreateSandboxRequest(sandbox_id=ID, hostname=ID, storages=[shm]), timeout=TIMEOUT
        ),
    )
    create = agent_pb2.CreateContainerRequest(
        container_id=ID, exec_id=ID, storages=[_tmpfs(ROOT, "mode=755")], OCI=_spec(program)
    )
    await agent.CreateContainer(create, timeout=TIMEOUT)
    await agent.StartContainer(agent_pb2.StartContainerRequest(container_id=ID), timeout=TIMEOUT)
    stream = agent_pb2.ReadStreamRequest(container_id=ID, exec_id=ID, len=4096)
    await asyncio.gather(
        agent.ReadStdout(stream, timeout=TIMEOUT),
        agent.ReadStderr(stream, timeout=TIMEOUT),
        agent.WaitProcess(agent_pb2.WaitProcessRequest(container_id=ID, exec_id=ID), timeout=TIMEOUT),
        return_exceptions=True,  # EOF is one
    )
    await agent.RemoveContainer(agent_pb2.RemoveContainerRequest(container_id=ID), timeout=TIMEOUT)


def _tmpfs(place: str, *options: str) -> agent_pb2.Storage:
    return agent_pb2.Storage(driver="ephemeral", source="tmpfs", fstype="tmpfs", mount_point=place, options=options)


def _spec(program: str) -> oci_pb2.Spec:
    """Return a configuration with what container engines put into theirs."""
    devices = [
        oci_pb2.LinuxDeviceCgroup(Allow=False, Access="rwm"),
        oci_pb2.LinuxDeviceCgroup(Allow=True, Type="c", Major=1, Minor=3, Access="rwm"),
    ]
    capabilities = oci_pb2.LinuxCapabilities(Bounding=CAPABILITIES, Effective=CAPABILITIES, Permitted=CAPABILITIES)
    keys = oci_pb2.LinuxSyscall(Names=["add_key", "keyctl", "request_key"], Action="SCMP_ACT_ERRNO")
    return oci_pb2.Spec(
        Version="1.1.0",
        Process=oci_pb2.Process(Args=["/program"], Env=["PATH=/"], Cwd="/", Capabilities=capabilities),
        Root=oci_pb2.Root(Path=ROOT),
        Hostname=ID,
        Mounts=[
            *(oci_pb2.Mount(destination=place, type=kind, source=source, options=options)
              for place, kind, source, options in MOUNTS),
            oci_pb2.Mount(destination="/program", type="bind", source=program, options=["rbind", "ro"]),
        ],
        Linux=oci_pb2.Linux(
            Namespaces=[oci_pb2.LinuxNamespace(Type=kind) for kind in NAMESPACES],
            CgroupsPath=f"/docker/{ID}",
            Resources=oci_pb2.LinuxResources(Devices=devices),
            Seccomp=oci_pb2.LinuxSeccomp(
                DefaultAction="SCMP_ACT_ALLOW", Architectures=ARCHITECTURES.get(os.uname().machine, ()), Syscalls=[keys]
            ),
            MaskedPaths=["/proc/acpi", "/proc/kcore", "/proc/keys", "/sys/firmware"],
            ReadonlyPaths=["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        ),
    )  # fmt: skip

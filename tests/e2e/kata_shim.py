"""Play a Kata 3.x shim with a remote hypervisor, as seen by a guest: its mounts, and its calls in order.

    python -m tests.e2e.kata_shim SOCKET ROOTFS SANDBOX [NETNS]

Runs in its own mount namespace, so that nothing is visible outside; prints its findings as a JSON object, and then
waits for EOF on stdin before it stops the VM.  The order of calls was recorded from Kata 4.1.0's shim running a pod of
two containers (virtcontainers/{sandbox,container,kata_agent}.go).
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from caisson.agent.rpc.ttrpc.client import Client, Stub
from caisson.agent.rpc.ttrpc.responses import RpcError
from caisson.proto.kata3 import agent_pb2, health_pb2, hypervisor_pb2, oci_pb2
from tests.native.kata3_support import SHARED, SHM, Host

#: What a shim sends for a plain `ctr run`: sizes chosen by the service.
ANNOTATIONS = {
    "io.kubernetes.cri.sandbox-name": "",
    "io.kubernetes.cri.sandbox-namespace": "",
    "io.katacontainers.config.hypervisor.machine_type": "",
    "io.katacontainers.config.hypervisor.image": "",
    "io.katacontainers.config.hypervisor.default_vcpus": "0",
    "io.katacontainers.config.hypervisor.default_memory": "0",
    "io.katacontainers.config.hypervisor.cc_init_data": "",
    "io.katacontainers.config.hypervisor.default_gpus": "0",
    "io.katacontainers.config.hypervisor.default_gpu_model": "",
}


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


class KataShim:
    """One sandbox; ``found`` holds the findings, by name."""

    def __init__(self, socket: str, rootfs: str, sandbox: str, netns: str = "") -> None:
        self._socket, self._rootfs, self._id, self._netns = socket, rootfs, sandbox, netns
        self._place = Path("/run/kata-containers/shared/sandboxes") / sandbox
        self.found: dict[str, Any] = {}

    async def hypervisor(self, method: str, request: Any) -> Any:
        """Call the service; the shim reconnects for each call."""
        async with await Client.connect(self._socket) as client:
            service = hypervisor_pb2.DESCRIPTOR.services_by_name["Hypervisor"]
            return await getattr(Stub(client, service), method)(request, timeout=600)

    def prepare(self) -> None:
        """Leave the host's mounts, and create the shared directory: a read-only slave of the mount directory."""
        mount("--make-rslave", "/")
        mount("--make-rshared", "/")
        Path("/run/kata-containers").mkdir(exist_ok=True)
        mount("-t", "tmpfs", "tmpfs", "/run/kata-containers")
        for name in ("mounts", "shared"):
            (self._place / name).mkdir(parents=True)
        mount("--bind", str(self._place / "mounts"), str(self._place / "shared"))
        mount("--make-slave", str(self._place / "shared"))
        mount("-o", "remount,bind,ro", str(self._place / "shared"))

    def share_rootfs(self, container: str) -> str:
        """Bind-mount a root where the guest sees it; return its path there."""
        place = self._place / "mounts" / container / "rootfs"
        place.mkdir(parents=True)
        mount("--bind", self._rootfs, str(place))
        return f"{SHARED}/{container}/rootfs"

    async def run(self) -> None:
        """Run a pod of two containers up to the point where it is stopped."""
        self.prepare()
        create = hypervisor_pb2.CreateVMRequest(id=self._id, annotations=ANNOTATIONS, networkNamespacePath=self._netns)
        began = time.monotonic()
        agent = (await self.hypervisor("CreateVM", create)).agentSocketPath
        await self.hypervisor("StartVM", hypervisor_pb2.StartVMRequest(id=self._id))
        async with Host(await Client.connect(agent), self._rootfs) as host:
            await host.health.Check(health_pb2.CheckRequest(), timeout=30)
            await self.create_sandbox(host)
            self.found["start"] = time.monotonic() - began
            event = asyncio.ensure_future(host.rpc.GetOOMEvent(agent_pb2.GetOOMEventRequest()))
            await self.create(host, self._id, "/bin/sleep", "1000")
            await host.rpc.StartContainer(agent_pb2.StartContainerRequest(container_id=self._id))
            await self.second_container(host)
            await self.exec_terminal(host)
            stats = await host.rpc.StatsContainer(agent_pb2.StatsContainerRequest(container_id=self._id))
            self.found["cpu"] = stats.cgroup_stats.cpu_stats.cpu_usage.total_usage
            if self._netns:
                self.found["network"] = await host.sh(self._id, "ip -o addr show dev eth0; ip route; ip -6 route")
            print(json.dumps(self.found), flush=True)
            await asyncio.to_thread(sys.stdin.read)
            await self.remove(host, "second")
            await self.remove(host, self._id)
            try:  # its errors are only logged
                await host.rpc.DestroySandbox(agent_pb2.DestroySandboxRequest(), timeout=60)
            except RpcError as error:
                print(f"DestroySandbox: {error}", file=sys.stderr)
            event.cancel()
        await self.hypervisor("StopVM", hypervisor_pb2.StopVMRequest(id=self._id))
        print(json.dumps(self.found), flush=True)

    async def create_sandbox(self, host: Host) -> None:
        request = agent_pb2.CreateSandboxRequest(
            sandbox_id=self._id, hostname="kata-pod", storages=[SHM], dns=["nameserver 10.9.0.1"]
        )
        await host.rpc.CreateSandbox(request, timeout=300)
        asked = agent_pb2.GuestDetailsRequest(mem_block_size=True, mem_hotplug_probe=True)
        details = await host.rpc.GetGuestDetails(asked, timeout=300)
        self.found["seccomp"] = details.agent_details.supports_seccomp

    async def create(self, host: Host, container: str, *args: str) -> None:
        bind = oci_pb2.Mount(destination="/dev/shm", type="bind", source=SHM.mount_point, options=["rbind"])
        root = await asyncio.to_thread(self.share_rootfs, container)
        spec = host.containerds_spec(*args, mounts=[bind], root=root, readonly=False)
        await host.create(container, spec)

    async def second_container(self, host: Host) -> None:
        """Run one that writes to its root and its streams, and exits by itself."""
        await self.create(
            host, "second", "/bin/sh", "-c", "hostname; echo written > /root/by-second; echo oops >&2; exit 3"
        )
        reads = [
            asyncio.ensure_future(
                read(agent_pb2.ReadStreamRequest(container_id="second", exec_id="second", len=32 << 10))
            )
            for read in (host.rpc.ReadStdout, host.rpc.ReadStderr)
        ]
        await host.rpc.StartContainer(agent_pb2.StartContainerRequest(container_id="second"))
        self.found["stdout"], self.found["stderr"] = [(await read).data.decode() for read in reads]
        wait = agent_pb2.WaitProcessRequest(container_id="second", exec_id="second")
        self.found["status"] = (await host.rpc.WaitProcess(wait)).status

    async def exec_terminal(self, host: Host) -> None:
        """Run `exec -t` in the first container: a terminal has only one output stream."""
        process = oci_pb2.Process(Terminal=True, Args=["/bin/sh"], Env=["PATH=/bin", "PS1=$ "], Cwd="/")
        await host.rpc.ExecProcess(agent_pb2.ExecProcessRequest(container_id=self._id, exec_id="tty", process=process))
        key = {"container_id": self._id, "exec_id": "tty"}
        await host.rpc.TtyWinResize(agent_pb2.TtyWinResizeRequest(row=50, column=132, **key))
        script = b"stty size; echo written > /root/by-exec; cat /root/by-second; date +%s; exit\n"
        await host.rpc.WriteStdin(agent_pb2.WriteStreamRequest(data=script, **key))
        self.found["terminal"] = (await host.output(**key)).decode()
        await host.rpc.WaitProcess(agent_pb2.WaitProcessRequest(**key))

    async def remove(self, host: Host, container: str) -> None:
        """Stop a container, and time its removal: the shim does not wait for it in a pod."""
        await host.rpc.SignalProcess(agent_pb2.SignalProcessRequest(container_id=container, signal=9))
        await host.rpc.WaitProcess(agent_pb2.WaitProcessRequest(container_id=container, exec_id=container))
        began = time.monotonic()
        await host.remove(container)
        self.found[f"remove {container}"] = time.monotonic() - began
        await host.rpc.RemoveStaleVirtiofsShareMounts(agent_pb2.RemoveStaleVirtiofsShareMountsRequest())
        place = self._place / "mounts" / container / "rootfs"
        await asyncio.to_thread(subprocess.check_call, ["umount", "--lazy", str(place)])


if __name__ == "__main__":
    asyncio.run(KataShim(*sys.argv[1:]).run())

"""A pod: its guest, which runs on what host.py has made, its network, and the forwarders into it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caisson.agent.pods import network
from caisson.agent.pods.guest import CALL_TIMEOUT, GuestNetwork, personalize, until_plugged
from caisson.agent.pods.machines import SHARE_TAG, MachineError
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.client import Client, Stub
from caisson.agent.shim import cgroup, dns
from caisson.agent.shim.bundle import CONTAINER_TYPE, TaskBundle
from caisson.agent.shim.cgroup import CgroupError
from caisson.agent.shim.errors import ShimError
from caisson.agent.shim.portforward import PortForwarder
from caisson.agent.shim.rootdisks import RootDisks
from caisson.agent.shim.spec import shares_pid_namespace, shm_size
from caisson.proto.contract import GUEST_SHARED, GUEST_SHM
from caisson.proto.kata3 import agent_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.base.log import Log
    from caisson.agent.pods.holder import Holder
    from caisson.agent.pods.machines import PodMachine
    from caisson.agent.shim.host import PodHost

#: Bytes of a hook's error output that become part of an error.
MAX_HOOK_ERROR = 800


class Pod:
    """One pod on its VM.  ``rpc`` is the agent's service, once started."""

    def __init__(self, host: PodHost, log: Log) -> None:
        self.id = host.id
        self.namespace = host.namespace
        self.rpc: Any = None
        self.sysctls: dict[str, str] = {}  # of a sandbox without a first container: each container sets them
        self.mounts: list[dict[str, Any]] = []  # likewise, where a container has none of its own at their places
        self.lost = asyncio.Event()  # the VM has exited
        self.is_of_cri = False
        self._host = host
        self._client: Client | None = None
        self._network: GuestNetwork | None = None
        self._forwarder: PortForwarder | None = None
        self._dns: dns.DnsForwarder | None = None
        self._log = log

    @property
    def shared(self) -> Path:
        """The directory of the host that the guest has at GUEST_SHARED."""
        return self._host.shared

    @property
    def pid(self) -> int:
        """A live process of the host in the pod's network namespace: containerd takes it for the containers'."""
        return self._holder.pid

    @property
    def _machine(self) -> PodMachine:
        assert self._host.machine is not None
        return self._host.machine

    @property
    def _holder(self) -> Holder:
        assert self._host.holder is not None
        return self._host.holder

    async def start(self, document: dict[str, Any], bundle: TaskBundle, shim_cgroup: str) -> None:
        """Start the VM of a pod from the configuration of its first container.

        ``shim_cgroup`` is this process's cgroup, if not the pod's.
        Raises MachineError, MountError, NetworkError, CgroupError or RpcError; nothing is left then.
        """
        self.is_of_cri = CONTAINER_TYPE in (document.get("annotations") or {})
        try:
            if not self._host.has_begun:
                await asyncio.to_thread(self._host.begin, document, bundle)
            machine = await asyncio.to_thread(self._host.wait)
            if shim_cgroup:
                cgroup.enter(shim_cgroup)
            self._client = await Client.connect(machine.agent_socket)
            self.rpc = Stub(self._client, agent_pb2.DESCRIPTOR.services_by_name["AgentService"])
            calls = [self._create(document)]
            if machine.is_clone:  # a clone's identity is needed by its containers, not by the pod
                calls.append(personalize(self.rpc))
            await asyncio.gather(*calls)
        except BaseException:
            await self.stop()
            raise

    async def abort(self) -> None:
        """Make `start`, or a pending call to the agent, fail soon: the VM is no longer needed."""
        if self._client is not None:
            await self._client.close()
        else:
            with contextlib.suppress(MachineError):  # it exits by itself, or does not exist yet
                await asyncio.to_thread(self._host.abort)

    async def _create(self, document: dict[str, Any]) -> None:
        storages = [
            agent_pb2.Storage(driver="virtio-fs", source=SHARE_TAG, fstype="virtiofs", mount_point=GUEST_SHARED),
            agent_pb2.Storage(
                driver="ephemeral", source="shm", fstype="tmpfs", mount_point=GUEST_SHM,
                options=["noexec", "nosuid", "nodev", "mode=1777", f"size={shm_size(document)}"],
            ),
        ]  # fmt: skip
        request = agent_pb2.CreateSandboxRequest(
            hostname=str(document.get("hostname") or "")[:64],
            sandbox_id=self.id,
            storages=storages,
            sandbox_pidns=shares_pid_namespace(document),
        )
        await until_plugged(self.rpc.CreateSandbox, request)

    def root_disks(self, container_id: str) -> RootDisks:
        """Return what plugs in the root of a container, if it can be a disk."""
        return RootDisks(self._machine, container_id, self._log)

    def record(self, bundle: TaskBundle) -> None:
        """Write the record for `delete` into another container's bundle.  Raises OSError."""
        self._host.record(bundle, owner=False)

    async def limit(self, resources: dict[str, Any]) -> None:
        """Change the CPU limits of the host's side.  Raises CgroupError or SpecError."""
        await self._host.limit(resources)

    async def connect_network(self) -> None:
        """Give the guest the interfaces, addresses and routes now in the pod's namespace, once.

        Raises NetworkError, MachineError or RpcError.
        """
        if self._network is None and self._host.holder is not None:
            self._network = GuestNetwork(self._holder.namespace, self._machine, self.rpc)
            await self._network.connect()
            if self.is_of_cri:
                await self._forward_ports(self._network.links)

    async def forward_dns(self) -> None:
        """Make docker's name server available to the guest, once.  Raises NetworkError or RpcError."""
        if self._dns is not None or self._network is None or not self._network.links:
            return
        await self._network.add_address_of_host(dns.OURS)
        self._dns = dns.DnsForwarder(self._holder.namespace)
        await self._dns.start()

    async def _forward_ports(self, links: Sequence[network.Link]) -> None:
        addresses = sorted((address for link in links for address, _ in link.addresses), key=lambda one: ":" in one)
        if not addresses or self._host.holder is None:
            return
        try:
            self._forwarder = await PortForwarder.start(self._holder.namespace, addresses[0])
        except network.NetworkError as error:
            self._log("warning", "ports of this pod cannot be forwarded", error=str(error))

    async def show_root(self, directory: Path) -> None:
        """Let clients reach a container's files by /proc/PID/root of `pid`.  Raises OSError."""
        await asyncio.to_thread(self._holder.change_root, directory)

    async def end_holder(self) -> None:
        """End the process that clients take for the containers', once the last of them has exited."""
        if self._host.holder is not None:
            await asyncio.to_thread(self._host.holder.end)

    async def run_hooks(self, document: dict[str, Any], names: tuple[str, ...], state: dict[str, Any]) -> None:
        """Run the host's hooks, which docker's network needs.  Raises ShimError."""
        hooks = document.get("hooks") or {}
        for name in names:
            for hook in hooks.get(name) or ():
                await asyncio.to_thread(_run_hook, hook, state, name)

    async def release(self) -> None:
        """Release the host's files before the VM stops, which takes longer; call `stop` afterwards.

        `delete` waits for this: once a client learns that the pod has ended, nothing of it is left.
        """
        try:
            await asyncio.to_thread(self._host.release)
        except MachineError as error:
            self._log("warning", "the share did not end before its VM", error=str(error))

    async def stop(self) -> None:
        """Stop the VM, and leave nothing of the pod behind."""
        for forwarder in (self._forwarder, self._dns):
            if forwarder is not None:
                forwarder.close()
        self._forwarder = self._dns = None
        if self._client is not None:
            await self._client.close()
            self._client = None
        try:
            await asyncio.to_thread(self._host.end_machine)
        except MachineError as error:
            self._log("error", "the VM did not stop", error=str(error))
        if self._network is not None:
            await asyncio.to_thread(self._network.disconnect)
        try:
            await self._host.remove()
        except CgroupError as error:
            self._log("error", "the pod's cgroup was not removed", error=str(error))


def _run_hook(hook: dict[str, Any], state: dict[str, Any], name: str) -> None:
    environment = dict(setting.partition("=")[::2] for setting in hook.get("env") or ())
    errors = os.memfd_create("hook", os.MFD_CLOEXEC)  # no pipe: a process that it leaves behind may keep it open
    try:
        done = subprocess.run(
            hook.get("args") or [hook["path"]], executable=hook["path"], input=json.dumps(state), env=environment,
            stdout=subprocess.DEVNULL, stderr=errors, text=True, timeout=hook.get("timeout") or CALL_TIMEOUT,
        )  # fmt: skip
        text = " ".join(os.pread(errors, MAX_HOOK_ERROR, 0).decode(errors="replace").split())
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ShimError(StatusCode.UNKNOWN, f"{name} hook {hook['path']}: {error}") from error
    finally:
        os.close(errors)
    if done.returncode != 0:
        raise ShimError(StatusCode.UNKNOWN, f"{name} hook {hook['path']}: exit status {done.returncode}: {text}")

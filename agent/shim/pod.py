"""A pod: its VM, its shared directory, its network namespace, and the containers in it."""

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
from caisson.agent.pods.guest import CALL_TIMEOUT, GUEST_SHARED, GuestNetwork, personalize, until_plugged
from caisson.agent.pods.machines import SHARE_TAG, MachineError, machine_name
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.client import Client, Stub
from caisson.agent.shim import cgroup, dns, mounts
from caisson.agent.shim.bundle import CONTAINER_TYPE, SANDBOX_MEMORY, BundleRecord, ProcessId, TaskBundle
from caisson.agent.shim.cgroup import CgroupError, HostCgroup
from caisson.agent.shim.errors import ShimError
from caisson.agent.shim.portforward import PortForwarder
from caisson.agent.shim.rootdisks import RootDisks
from caisson.agent.shim.spec import network_namespace, shares_pid_namespace
from caisson.proto.kata3 import agent_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.base.log import Log
    from caisson.agent.pods.machines import Machines, PodMachine

#: The directory of all pods, beside that of VMs.
PODS = Path(f"{os.environ.get('CAISSON_RUN', '/run/caisson')}-pods")

MIB = 1 << 20

#: MiB that a guest needs in addition to its containers' limits.
OVERHEAD = 192


class Pod:
    """One pod on its VM.  ``rpc`` is the agent's service, once started."""

    def __init__(self, sandbox_id: str, namespace: str, machines: Machines, log: Log) -> None:
        self.id = sandbox_id
        self.namespace = namespace
        self.name = machine_name(namespace, sandbox_id)
        self.directory = PODS / self.name
        self.rpc: Any = None
        self._machines = machines
        self._machine: PodMachine | None = None
        self._client: Client | None = None
        self._holder: network.Holder | None = None
        self._holder_id: ProcessId | None = None
        self._helpers: list[ProcessId] = []
        self._network: GuestNetwork | None = None
        self._cgroup: HostCgroup | None = None
        self._cgroups: dict[str, str] = {}  # its directories
        self._forwarder: PortForwarder | None = None
        self._dns: dns.DnsForwarder | None = None
        self._bundle: TaskBundle | None = None  # the owner's
        self._aborted = False
        self.sysctls: dict[str, str] = {}  # of a sandbox without a first container: each container sets them
        self.mounts: list[dict[str, Any]] = []  # likewise, where a container has none of its own at their places
        self.lost = asyncio.Event()  # the VM has exited
        self.is_of_cri = False
        self._log = log

    @property
    def shared(self) -> Path:
        """The directory of the host that the guest has at GUEST_SHARED."""
        return self.directory / "shared"

    @property
    def pid(self) -> int:
        """A live process of the host in the pod's network namespace: containerd takes it for the containers'."""
        assert self._holder is not None
        return self._holder.pid

    async def start(self, document: dict[str, Any], bundle: TaskBundle, shim_cgroup: str) -> None:
        """Start the VM of a pod from the configuration of its first container.

        ``shim_cgroup`` is this process's cgroup, if not the pod's.
        Raises MachineError, MountError, NetworkError, CgroupError or RpcError; nothing is left then.
        """
        self.is_of_cri = CONTAINER_TYPE in (document.get("annotations") or {})
        try:
            self._cgroups = cgroup.planned(document)
            self._holder = await asyncio.to_thread(network.Holder, network_namespace(document))
            self._holder_id = ProcessId.of(self._holder.pid)
            self._helpers = [ProcessId.of(pid) for pid in self._machines.pids]
            self.record(bundle, owner=True)
            self._cgroup = HostCgroup.join(document, self._machines.pids)
            await asyncio.to_thread(mounts.make_shared, self.shared)
            self._machine = await self._start_machine(document)
            if shim_cgroup:
                cgroup.enter(shim_cgroup)
            self._client = await Client.connect(self._machine.agent_socket)
            self.rpc = Stub(self._client, agent_pb2.DESCRIPTOR.services_by_name["AgentService"])
            calls = [self._create(document)]
            if self._machine.is_clone:  # a clone's identity is needed by its containers, not by the pod
                calls.append(personalize(self.rpc))
            await asyncio.gather(*calls)
        except BaseException:
            await self.stop()
            raise

    async def _start_machine(self, document: dict[str, Any]) -> PodMachine:
        if self._aborted:
            raise MachineError(f"VM {self.name}: is no longer needed")
        memory, cpus = size_of(document)
        share = (SHARE_TAG, self.shared)
        return await asyncio.to_thread(self._machines.start, self.name, memory=memory, cpus=cpus, share=share)

    async def abort(self) -> None:
        """Make `start`, or a pending call to the agent, fail soon: the VM is no longer needed."""
        self._aborted = True
        if self._client is not None:
            await self._client.close()
        else:
            with contextlib.suppress(MachineError):  # it exits by itself, or does not exist yet
                await asyncio.to_thread(self._machines.stop, self.name)

    async def _create(self, document: dict[str, Any]) -> None:
        storages = [
            agent_pb2.Storage(driver="virtio-fs", source=SHARE_TAG, fstype="virtiofs", mount_point=GUEST_SHARED),
            agent_pb2.Storage(
                driver="ephemeral", source="shm", fstype="tmpfs", mount_point="/run/kata-containers/sandbox/shm",
                options=["noexec", "nosuid", "nodev", "mode=1777", f"size={64 * MIB}"],
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
        assert self._machine is not None
        return RootDisks(self._machine, container_id, self._log)

    def record(self, bundle: TaskBundle, *, owner: bool, ending: bool = False) -> None:
        """Write the record for `delete` into a bundle, in case this process is killed."""
        holder = self._holder_id
        assert holder is not None
        if owner:
            self._bundle = bundle
        shim = ProcessId.of(os.getpid())
        bundle.write(
            BundleRecord(
                self.id, owner, self.name, str(self.directory), shim, holder, self._cgroups, self._helpers, ending
            )
        )

    async def connect_network(self) -> None:
        """Give the guest the interfaces, addresses and routes now in the pod's namespace, once.

        Raises NetworkError, MachineError or RpcError.
        """
        if self._network is None and self._holder is not None:
            assert self._machine is not None
            self._network = GuestNetwork(self._holder.namespace, self._machine, self.rpc)
            await self._network.connect()
            if self.is_of_cri:
                await self._forward_ports(self._network.links)

    async def forward_dns(self) -> None:
        """Make docker's name server available to the guest, once.  Raises NetworkError or RpcError."""
        if self._dns is not None or self._network is None or not self._network.links:
            return
        await self._network.add_address_of_host(dns.OURS)
        assert self._holder is not None
        self._dns = dns.DnsForwarder(self._holder.namespace)
        await self._dns.start()

    async def _forward_ports(self, links: Sequence[network.Link]) -> None:
        addresses = sorted((address for link in links for address, _ in link.addresses), key=lambda one: ":" in one)
        if not addresses or self._holder is None:
            return
        try:
            self._forwarder = await PortForwarder.start(self._holder.namespace, addresses[0])
        except network.NetworkError as error:
            self._log("warning", "ports of this pod cannot be forwarded", error=str(error))

    async def end_holder(self) -> None:
        """End the process that clients take for the containers', once the last of them has exited."""
        if self._holder is not None:
            await asyncio.to_thread(self._holder.end)

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
        if self._bundle is not None:
            self.record(self._bundle, owner=True, ending=True)
        if self._machine is not None:
            try:
                await asyncio.to_thread(self._machine.end_share, SHARE_TAG)
            except MachineError as error:
                self._log("warning", "the share did not end before its VM", error=str(error))
        await asyncio.to_thread(mounts.release, self.shared)

    async def stop(self) -> None:
        """Stop the VM, and leave nothing of the pod behind."""
        for forwarder in (self._forwarder, self._dns):
            if forwarder is not None:
                forwarder.close()
        self._forwarder = self._dns = None
        if self._client is not None:
            await self._client.close()
            self._client = None
        if self._machine is not None:
            machine, self._machine = self._machine, None
            try:
                await asyncio.to_thread(machine.stop)
            except MachineError as error:
                self._log("error", "the VM did not stop", error=str(error))
        await asyncio.to_thread(mounts.release, self.shared)
        await asyncio.to_thread(mounts.release, self.directory)
        if self._holder is not None:
            if self._network is not None:
                await asyncio.to_thread(self._network.disconnect)
            self._holder.close()
            self._holder = None
        if self._cgroup is not None:
            joined, self._cgroup = self._cgroup, None
            try:
                await joined.leave()
            except CgroupError as error:
                self._log("error", "the pod's cgroup was not removed", error=str(error))
        if self._bundle is not None:
            bundle, self._bundle = self._bundle, None
            await asyncio.to_thread(mounts.unmount_rootfs, bundle.path)
            bundle.forget()


def size_of(document: dict[str, Any]) -> tuple[int, int]:
    """Return the MiB and CPUs of a VM for a configuration's limits; 0 for the default."""
    resources = (document.get("linux") or {}).get("resources") or {}
    annotated = (document.get("annotations") or {}).get(SANDBOX_MEMORY, "")
    limit = int(annotated) if annotated.isdecimal() else int((resources.get("memory") or {}).get("limit") or 0)
    cpu = resources.get("cpu") or {}
    quota, period = int(cpu.get("quota") or 0), int(cpu.get("period") or 0) or 100_000
    return (limit // MIB + OVERHEAD if limit > 0 else 0), (-(-quota // period) if quota > 0 else 0)


def _run_hook(hook: dict[str, Any], state: dict[str, Any], name: str) -> None:
    environment = dict(setting.partition("=")[::2] for setting in hook.get("env") or ())
    try:
        done = subprocess.run(
            hook.get("args") or [hook["path"]], executable=hook["path"], input=json.dumps(state), env=environment,
            capture_output=True, text=True, timeout=hook.get("timeout") or CALL_TIMEOUT,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ShimError(StatusCode.UNKNOWN, f"{name} hook {hook['path']}: {error}") from error
    if done.returncode != 0:
        text = " ".join(done.stderr.split())
        raise ShimError(StatusCode.UNKNOWN, f"{name} hook {hook['path']}: exit status {done.returncode}: {text}")

"""One pod's VM, from CreateVM to StopVM or the shim's exit, whichever comes first."""

from __future__ import annotations

import asyncio
import os
import time

from caisson.agent.hypervisor.peer import Peer, PeerError
from caisson.agent.pods.guest import CALL_TIMEOUT, GuestNetwork, personalize
from caisson.agent.pods.machines import SHARE_TAG, MachineError, machine_name
from caisson.agent.pods.network import NetworkError
from caisson.agent.rpc.ttrpc.client import Client, Stub
from caisson.agent.rpc.ttrpc.responses import RpcError
from caisson.proto.caisson import caisson_pb2
from caisson.proto.contract import GUEST_SHARED
from caisson.proto.kata3 import agent_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from caisson.agent.base.log import Log
    from caisson.agent.pods.machines import Machines, PodMachine

#: Where a shim bind-mounts what its containers need, in its own mount namespace: read-only at the top, so that a guest
#: can add nothing; the roots mounted below keep their modes.
SHARED = "/run/kata-containers/shared/sandboxes/{}/shared"

#: Seconds between two attempts to stop a VM that is just starting.
STOP_INTERVAL = 0.1

#: The errors that starting a VM can raise.
FAILURES = (MachineError, NetworkError, PeerError, RpcError, OSError)


class SandboxVM:
    """A VM, and all its resources on the host."""

    def __init__(
        self, sandbox_id: str, shim: Peer, machines: Machines, log: Log, *, memory: int, cpus: int, namespace: str
    ) -> None:
        """``memory`` (MiB) and ``cpus`` are minimums, 0 for the service's own choice; ``namespace`` is the path
        of a network namespace, empty for none.  ``shim`` is closed when it stops.
        """
        self.id = sandbox_id
        self.name = machine_name(sandbox_id)
        self.shim = shim
        self._machines = machines
        self._memory, self._cpus = memory, cpus
        self._namespace = namespace
        self._log = log.bind(sandbox=sandbox_id, vm=self.name)
        self._machine: PodMachine | None = None
        self._network: GuestNetwork | None = None
        self._starting: asyncio.Task[None] | None = None
        self._ending = False
        self._stopping = asyncio.Lock()

    @property
    def agent_socket(self) -> Path:
        """The Unix socket of the agent: plain ttrpc, once the VM is started."""
        return self._machines.agent_socket(self.name)

    @property
    def started(self) -> bool:
        """Whether StartVM was called."""
        return self._starting is not None

    async def start(self) -> None:
        """Start it, mount its share, and configure its network.

        Raises MachineError, NetworkError, PeerError, RpcError or OSError; nothing is left of it then.
        """
        self._starting = asyncio.get_running_loop().create_task(self._start())
        try:
            await asyncio.shield(self._starting)
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        began = time.monotonic()
        start = self._machines.start
        self._machine = await asyncio.to_thread(start, self.name, memory=self._memory, cpus=self._cpus)
        booted = time.monotonic()
        shared = SHARED.format(self.id)
        has_share = await asyncio.to_thread(self.shim.is_directory, shared)
        if has_share:
            await asyncio.to_thread(self._share, self._machine, shared)
        async with await Client.connect(self._machine.agent_socket) as client:
            agent = Stub(client, agent_pb2.DESCRIPTOR.services_by_name["AgentService"])
            guest = Stub(client, caisson_pb2.DESCRIPTOR.services_by_name["Guest"])
            await personalize(agent)
            if has_share:
                mount = caisson_pb2.MountRequest(source=SHARE_TAG, fstype="virtiofs", mount_point=GUEST_SHARED)
                await guest.Mount(mount, timeout=CALL_TIMEOUT)
            if self._namespace:
                self._network = GuestNetwork(self._namespace, self._machine, agent)
                await self._network.connect()
        if self._ending:
            raise MachineError(f"VM {self.name}: was stopped while it started")
        times = {"booted": round(booted - began, 3), "seconds": round(time.monotonic() - began, 3)}
        self._log("info", "started a VM", **times, share=has_share, network=bool(self._namespace))

    def _share(self, machine: PodMachine, directory: str) -> None:
        namespace = self.shim.mount_namespace()
        try:
            machine.share_of_namespace(directory, SHARE_TAG, namespace)
        finally:
            os.close(namespace)

    async def stop(self) -> None:
        """Stop it, and leave nothing behind; a second caller waits.  Logs what cannot be stopped."""
        self._ending = True
        async with self._stopping:
            await self._stop()

    async def _stop(self) -> None:
        while self._starting is not None and not self._starting.done():
            await self._attempt(self._machines.stop, self.name)
            await asyncio.wait([self._starting], timeout=STOP_INTERVAL)
        if self._machine is not None:
            machine, self._machine = self._machine, None
            await self._attempt(machine.stop)
            self._log("info", "ended a VM")
        if self._network is not None:
            network, self._network = self._network, None
            await asyncio.to_thread(network.disconnect)
        self.shim.close()

    async def _attempt(self, stop: Callable[..., None], *arguments: str) -> None:
        try:
            await asyncio.to_thread(stop, *arguments)
        except MachineError as error:
            self._log("error", "the VM did not stop", error=str(error))

"""hypervisor.Hypervisor: what a Kata 3.x shim with `[hypervisor.remote]` calls.

Source: Kata Containers, src/runtime/protocols/hypervisor/hypervisor.proto and src/runtime/virtcontainers/remote.go.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from caisson.agent.hypervisor.peer import Peer
from caisson.agent.hypervisor.sandbox import FAILURES, SandboxVM
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.dispatch import Service
from caisson.proto.contract import VERSION
from caisson.proto.kata3 import hypervisor_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from caisson.agent.base.log import Log
    from caisson.agent.pods.machines import Machines

#: Valid ids of containerd and CRI-O; an id is part of a path.
SANDBOX_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")

#: Prefix of the annotations with a pod's configuration; omitted below.
PREFIX = "io.katacontainers.config.hypervisor."

#: Annotations for unsupported features; "0" and "" request nothing.
UNSUPPORTED = {
    "image": "the image is the service's; choose it there: caisson hypervisor --image",
    "cc_init_data": "VMs are not confidential here; leave it out",
    "default_gpus": "VMs have no GPUs; leave it out",
    "default_gpu_model": "VMs have no GPUs; leave it out",
}

#: The largest size that an annotation can request: MiB, and CPUs.
MAX_MEMORY, MAX_CPUS = 16 << 20, 255


class HypervisorError(Exception):
    """A request that cannot be fulfilled."""

    def __init__(self, code: StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


def status_of(error: Exception) -> tuple[StatusCode, str] | None:
    """Return the status and text of an error; None for a bug."""
    if isinstance(error, HypervisorError):
        return error.code, str(error)
    if isinstance(error, FAILURES):
        return StatusCode.UNKNOWN, str(error)
    return None


class Sandboxes:
    """All VMs of the service, by sandbox id; each stops with its shim."""

    def __init__(self, machines: Machines, log: Log) -> None:
        self._machines = machines
        self._log = log
        self._vms: dict[str, SandboxVM] = {}
        self._endings: set[asyncio.Task[None]] = set()

    @property
    def ids(self) -> list[str]:
        """The ids of sandboxes that have a VM, or are getting one."""
        return list(self._vms)

    def add(self, sandbox_id: str, shim: Peer, *, memory: int, cpus: int, namespace: str) -> SandboxVM:
        """Prepare a VM, and watch its shim.  Raises HypervisorError for an id that is in use."""
        if sandbox_id in self._vms:
            raise HypervisorError(StatusCode.ALREADY_EXISTS, f"sandbox {sandbox_id}: already has a VM; stop it first")
        vm = SandboxVM(sandbox_id, shim, self._machines, self._log, memory=memory, cpus=cpus, namespace=namespace)
        self._vms[sandbox_id] = vm
        asyncio.get_running_loop().add_reader(shim.pidfd, self._shim_ended, vm)
        return vm

    def get(self, sandbox_id: str) -> SandboxVM:
        """Return the VM of a sandbox.  Raises HypervisorError."""
        if sandbox_id not in self._vms:
            raise HypervisorError(StatusCode.NOT_FOUND, f"sandbox {sandbox_id}: has no VM; create it first")
        return self._vms[sandbox_id]

    async def end(self, sandbox_id: str) -> None:
        """Stop the VM of a sandbox, if there is one."""
        vm = self._vms.get(sandbox_id)
        if vm is None:
            return
        if vm.shim.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(vm.shim.pidfd)
        await vm.stop()
        if self._vms.get(sandbox_id) is vm:
            del self._vms[sandbox_id]

    async def end_all(self) -> None:
        """Stop all VMs."""
        await asyncio.gather(*map(self.end, list(self._vms)))

    def _shim_ended(self, vm: SandboxVM) -> None:
        self._log("warning", "a shim exited without stopping its VM", sandbox=vm.id, vm=vm.name, pid=vm.shim.pid)
        loop = asyncio.get_running_loop()
        loop.remove_reader(vm.shim.pidfd)
        ending = loop.create_task(self.end(vm.id))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)


class HypervisorService:
    """The service for one connection: ``connect`` creates the Peer at its other end."""

    def __init__(self, sandboxes: Sandboxes, connect: Callable[[], Peer]) -> None:
        self._sandboxes = sandboxes
        self._connect = connect

    async def CreateVM(self, request: Any) -> Any:
        """Prepare a VM: nothing runs yet, but its agent's address is known."""
        if not SANDBOX_ID.fullmatch(request.id):
            text = f"id {request.id!r}: is not a sandbox's; give up to 128 letters, digits, '_', '.' and '-'"
            raise HypervisorError(StatusCode.INVALID_ARGUMENT, text)
        memory, cpus = size_of(request.annotations)
        shim = self._connect()
        try:
            vm = self._sandboxes.add(request.id, shim, memory=memory, cpus=cpus, namespace=request.networkNamespacePath)
        except BaseException:
            shim.close()
            raise
        return hypervisor_pb2.CreateVMResponse(agentSocketPath=str(vm.agent_socket))

    async def StartVM(self, request: Any) -> Any:
        """Start it; when this returns, its agent serves, with share and network set up."""
        vm = self._sandboxes.get(request.id)
        if vm.started:
            text = f"sandbox {request.id}: its VM was already started"
            raise HypervisorError(StatusCode.FAILED_PRECONDITION, text)
        try:
            await vm.start()
        except BaseException:
            await self._sandboxes.end(request.id)
            raise
        return hypervisor_pb2.StartVMResponse()

    async def StopVM(self, request: Any) -> Any:
        """Stop it, if it exists."""
        await self._sandboxes.end(request.id)
        return hypervisor_pb2.StopVMResponse()

    async def Version(self, request: Any) -> Any:
        """Return our version; shims accept any."""
        return hypervisor_pb2.VersionResponse(version=VERSION)


SERVICE = Service(hypervisor_pb2.DESCRIPTOR.services_by_name["Hypervisor"], HypervisorService)


def size_of(annotations: Mapping[str, str]) -> tuple[int, int]:
    """Return the MiB and CPUs that a pod's annotations ask for, 0 if not given.

    Raises HypervisorError for an invalid value, or an unsupported feature.
    """
    for name, remedy in UNSUPPORTED.items():
        if annotations.get(PREFIX + name, "") not in ("", "0"):
            raise HypervisorError(StatusCode.INVALID_ARGUMENT, f"annotation {PREFIX}{name}: {remedy}")
    return _number(annotations, "default_memory", MAX_MEMORY), _number(annotations, "default_vcpus", MAX_CPUS)


def _number(annotations: Mapping[str, str], name: str, most: int) -> int:
    text = annotations.get(PREFIX + name) or "0"
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) <= most):
        text = f"annotation {PREFIX}{name}: {text!r} is not a number from 0 to {most}"
        raise HypervisorError(StatusCode.INVALID_ARGUMENT, text)
    return int(text)

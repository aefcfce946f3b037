"""A pod's part of the host: its cgroup, its network namespace, its shared directory and its VM.

No event loop, no protobuf: the VM of a container's own pod starts while its shim is still importing its server.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

from caisson.agent.pods.holder import Holder
from caisson.agent.pods.machines import SHARE_TAG, MachineError, machine_name
from caisson.agent.shim import cgroup, mounts
from caisson.agent.shim.bundle import SANDBOX_MEMORY, BundleRecord, ProcessId, TaskBundle
from caisson.agent.shim.cgroup import HostCgroup
from caisson.agent.shim.launch import group_in
from caisson.agent.shim.spec import UnsupportedSpec, guest_spec, network_namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.pods.machines import Machines, PodMachine

#: The directory of all pods, beside that of VMs.
PODS = Path(f"{os.environ.get('CAISSON_RUN', '/run/caisson')}-pods")

MIB = 1 << 20

#: MiB that a guest needs in addition to its containers' limits.
OVERHEAD = 192


class PodHost:
    """What one pod has on the host, made by ``begin`` and ``wait``, which block.

    Whatever their outcome, ``end_machine`` and then ``remove`` leave nothing of it.
    """

    def __init__(self, sandbox_id: str, namespace: str, machines: Machines) -> None:
        self.id = sandbox_id
        self.namespace = namespace
        self.name = machine_name(namespace, sandbox_id)
        self.directory = PODS / self.name
        self.machine: PodMachine | None = None
        self.holder: Holder | None = None
        self._cgroup: HostCgroup | None = None
        self._machines = machines
        self._starting: threading.Thread | None = None
        self._error: BaseException | None = None
        self._aborted = False
        self._holder_id: ProcessId | None = None
        self._helpers: list[ProcessId] = []
        self._cgroups: dict[str, str] = {}  # its directories
        self._bundle: TaskBundle | None = None  # the owner's

    @property
    def shared(self) -> Path:
        """The directory that the guest has at GUEST_SHARED."""
        return self.directory / "shared"

    @property
    def has_begun(self) -> bool:
        return self._starting is not None or self._error is not None

    def begin(self, document: dict[str, Any], bundle: TaskBundle) -> None:
        """Start the VM of a pod from the configuration of its first container; ``wait`` reports errors."""
        try:
            size = size_of(document)
            holder = self._prepare(document, bundle)
            self._starting = threading.Thread(target=self._start_machine, args=size)
            self._starting.start()
            holder.open()
        except BaseException as error:
            self._error = error

    def wait(self) -> PodMachine:
        """Wait for the VM, and return it.

        Raises MachineError, MountError, NetworkError, CgroupError, SpecError or OSError; what was made until then is
        left for ``end_machine`` and ``remove``.
        """
        if self._starting is not None:
            self._starting.join()
        if self._error is not None:
            raise self._error
        assert self.machine is not None
        return self.machine

    def _prepare(self, document: dict[str, Any], bundle: TaskBundle) -> Holder:
        self._cgroups = cgroup.planned(document)
        self.holder = Holder(network_namespace(document))
        try:
            self._holder_id = ProcessId.of(self.holder.pid)
        except ProcessLookupError:
            self.holder.open()  # raises the reason
            raise
        self._helpers = [ProcessId.of(pid) for pid in self._machines.pids]
        self.record(bundle, owner=True)
        self._cgroup = HostCgroup.join(document, self._machines.pids)
        mounts.make_shared(self.shared)
        return self.holder

    def _start_machine(self, memory: int, cpus: int) -> None:
        try:
            if self._aborted:
                raise MachineError(f"VM {self.name}: is no longer needed")
            share = (SHARE_TAG, self.shared)
            self.machine = self._machines.start(self.name, memory=memory, cpus=cpus, share=share)
        except BaseException as error:
            self._error = self._error or error

    def abort(self) -> None:
        """Make ``wait`` fail soon: the VM is no longer needed.  Raises MachineError."""
        self._aborted = True
        self._machines.stop(self.name)

    async def limit(self, resources: dict[str, Any]) -> None:
        """Change the CPU limits of its cgroup, if it has one.  Raises CgroupError or SpecError."""
        if self._cgroup is not None:
            await self._cgroup.update(resources)

    def record(self, bundle: TaskBundle, *, owner: bool, ending: bool = False) -> None:
        """Write the record for `delete` into a bundle, in case this process is killed.  Raises OSError."""
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

    def release(self) -> None:
        """Release the host's files before the VM stops, which takes longer.  Raises MachineError.

        `delete` waits for this: once a client learns that the pod has ended, nothing of it is left.
        """
        if self._bundle is not None:
            self.record(self._bundle, owner=True, ending=True)
        try:
            if self.machine is not None:
                self.machine.end_share(SHARE_TAG)
        finally:
            mounts.release(self.shared)

    def end_machine(self) -> None:
        """Stop the VM, even one that is just starting.  Raises MachineError."""
        if self._starting is not None and self._starting.is_alive():
            with contextlib.suppress(MachineError):
                self.abort()
            self._starting.join()
        machine, self.machine = self.machine, None
        try:
            if machine is not None:
                machine.stop()
        finally:
            mounts.release(self.shared)
            mounts.release(self.directory)

    async def remove(self) -> None:
        """Remove the namespace, the cgroup and the record, after the VM has ended.  Raises CgroupError."""
        if self.holder is not None:
            self.holder.close()
            self.holder = None
        joined, self._cgroup = self._cgroup, None
        try:
            if joined is not None:
                await joined.leave()
        finally:
            bundle, self._bundle = self._bundle, None
            if bundle is not None:
                mounts.unmount_rootfs(bundle.path)
                bundle.forget()


def begin_early(container_id: str, namespace: str, machines: Machines) -> PodHost | None:
    """Begin the pod of a container whose bundle is the working directory; None if its VM has to wait for Create.

    That reports what is wrong with a configuration, brings a sandbox's, and knows the pod of another container's.
    """
    bundle = TaskBundle(".", container_id)
    try:
        document = bundle.config()
        guest_spec(document, container_id)
    except (OSError, ValueError, TypeError, AttributeError, UnsupportedSpec):
        return None
    if group_in(document) not in ("", container_id):
        return None
    host = PodHost(container_id, namespace, machines)
    host.begin(document, bundle)
    return host


def size_of(document: dict[str, Any]) -> tuple[int, int]:
    """Return the MiB and CPUs of a VM for a configuration's limits; 0 for the default."""
    resources = (document.get("linux") or {}).get("resources") or {}
    annotated = (document.get("annotations") or {}).get(SANDBOX_MEMORY, "")
    limit = int(annotated) if annotated.isdecimal() else int((resources.get("memory") or {}).get("limit") or 0)
    cpu = resources.get("cpu") or {}
    quota, period = int(cpu.get("quota") or 0), int(cpu.get("period") or 0) or 100_000
    return (limit // MIB + OVERHEAD if limit > 0 else 0), (-(-quota // period) if quota > 0 else 0)

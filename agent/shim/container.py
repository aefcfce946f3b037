"""A container in a pod: its creation, start, processes and removal."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

from caisson.agent.pods.guest import CALL_TIMEOUT, until_plugged
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.responses import ConnectionClosed, RpcError
from caisson.agent.shim import dns, mounts
from caisson.agent.shim.bundle import TaskBundle
from caisson.agent.shim.errors import ShimError, finished, not_found, wrong_state
from caisson.agent.shim.pod import Pod
from caisson.agent.shim.process import CREATED, RUNNING, STOPPED, Process
from caisson.agent.shim.spec import Volume, fill_known, guest_resources, guest_spec, shares_pid_namespace
from caisson.proto.kata3 import agent_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

RESOLV_CONF = "/etc/resolv.conf"

#: Bytes by which a copy of it may grow before the container starts: for a second, the guest's kernel keeps a file's
#: size, and reads to a nearer end of file, but not to a later one.
RESOLV_CONF_ROOM = 1 << 16

#: Seconds that a container's exit event waits for those of its execs, which are published first.
EXECS_TIMEOUT = 2.0


class Container:
    """One container; ``owner`` if its pod stops with it."""

    def __init__(self, pod: Pod, bundle: TaskBundle, document: dict[str, Any], request: Any, *, owner: bool):
        self.id = bundle.id
        self.bundle = bundle
        self.owner = owner
        self.paused = False
        self.init = Process(pod.rpc, self.id, "", self.id, request, pod.namespace)
        self.execs: dict[str, Process] = {}
        self._count = 0
        self._pod = pod
        self._document = document
        self._lock = asyncio.Lock()
        self._disks = pod.root_disks(self.id)
        self._resolv_conf: Path | None = None  # the host's, of which the container has a copy

    @classmethod
    async def create(
        cls, pod: Pod, bundle: TaskBundle, document: dict[str, Any], request: Any, *, owner: bool
    ) -> Container:
        """Create a container in a pod's guest.  Raises the errors that status_of knows; nothing of it is left then."""
        container = cls(pod, bundle, document, request, owner=owner)
        try:
            await container._create(request)
        except BaseException:
            await container.init.close()
            await asyncio.to_thread(container.unmount)
            if not owner:  # else they end with the VM
                await asyncio.to_thread(container._disks.unplug)
            raise
        return container

    async def _create(self, request: Any) -> None:
        pod = self._pod
        linux = self._document.setdefault("linux", {})
        linux["sysctl"] = {**pod.sysctls, **(linux.get("sysctl") or {})}
        given = self._document.get("mounts") or []
        taken = {mount.get("destination") for mount in given}
        self._document["mounts"] = given + [mount for mount in pod.mounts if mount["destination"] not in taken]
        wanted = guest_spec(self._document, self.id)
        place = pod.shared / self.id
        storages = await asyncio.to_thread(self._disks.plug, request.rootfs)
        if storages:
            wanted.document["root"]["path"] = self._disks.mount_point
        else:
            root = str((self._document.get("root") or {}).get("path") or "rootfs")
            await asyncio.to_thread(
                mounts.mount_rootfs, request.rootfs, self.bundle.path / "rootfs", place / "rootfs", root
            )
            if self.owner:
                await pod.show_root(place / "rootfs")
        await asyncio.to_thread(mounts.bind_volumes, self._with_own_resolv_conf(wanted.volumes), place)
        await self.init.open()
        create = agent_pb2.CreateContainerRequest(
            container_id=self.id, exec_id=self.id, storages=storages,
            sandbox_pidns=shares_pid_namespace(self._document),
        )  # fmt: skip
        fill_known(create.OCI, wanted.document)
        # The hooks concern the host's side of the pod, which is ready: they need not wait for the guest's.
        hooks = asyncio.ensure_future(self._run_hooks("prestart", "createRuntime"))
        try:
            if storages:
                await until_plugged(pod.rpc.CreateContainer, create)
            else:
                await pod.rpc.CreateContainer(create, timeout=CALL_TIMEOUT)
        finally:
            await hooks

    def _with_own_resolv_conf(self, volumes: Iterable[Volume]) -> list[Volume]:
        """Replace the host's resolv.conf by a copy: docker writes its name server into it as late as just before start.

        A pod's file comes from the kubelet, and is final.
        """
        chosen = []
        for volume in volumes:
            if volume.destination == RESOLV_CONF and not self._pod.is_of_cri:
                self._resolv_conf = Path(volume.source)
                copy = self.bundle.path / "resolv.conf"
                shutil.copyfile(volume.source, copy)
                os.truncate(copy, copy.stat().st_size + RESOLV_CONF_ROOM)
                volume = volume.but(source=str(copy))
            chosen.append(volume)
        return chosen

    async def _connect(self) -> None:
        """Connect the pod's network, and docker's name server, which is configured by now."""
        await self._pod.connect_network()
        if self._resolv_conf is not None:
            text = self._resolv_conf.read_text(errors="replace")
            guests = dns.rewritten(text)
            if guests != text:
                await self._pod.forward_dns()
            (self.bundle.path / "resolv.conf").write_text(guests)

    async def _run_hooks(self, *names: str) -> None:
        state = {
            "ociVersion": "1.0.2", "id": self.id, "status": "created", "pid": self._pod.pid,
            "bundle": str(self.bundle.path), "annotations": self._document.get("annotations") or {},
        }  # fmt: skip
        await self._pod.run_hooks(self._document, names, state)

    def process(self, exec_id: str) -> Process:
        """Return a process; init for an empty id.  Raises ShimError."""
        if not exec_id:
            return self.init
        if exec_id not in self.execs:
            raise not_found(f"process {exec_id} of container {self.id}")
        return self.execs[exec_id]

    async def start(self) -> None:
        """Start the init process.  Raises the errors that status_of knows; its streams are closed then."""
        async with self._lock:
            if self.init.status != CREATED:
                raise wrong_state(f"container {self.id}: not in created state")
            try:
                await self._connect()
                request = agent_pb2.StartContainerRequest(container_id=self.id)
                await self._pod.rpc.StartContainer(request, timeout=CALL_TIMEOUT)
            except BaseException:
                await self.init.close()
                raise
            await self._run_hooks("poststart")

    def add_exec(self, request: Any) -> Process:
        """Register a process to be started later.  Raises ShimError."""
        if request.exec_id in self.execs or request.exec_id == self.id:
            raise ShimError(StatusCode.ALREADY_EXISTS, f"process {request.exec_id}: already exists")
        if self.init.status != RUNNING:
            raise wrong_state(f"container {self.id}: not running")
        pod = self._pod
        self._count += 1  # the agent keeps an id for its exit status; containerd may use it again at once
        process = Process(pod.rpc, self.id, request.exec_id, f"exec-{self._count}", request, pod.namespace)
        process.spec = json.loads(request.spec.value)
        self.execs[request.exec_id] = process
        return process

    async def start_exec(self, process: Process) -> None:
        """Start a registered process.  Raises the errors that status_of knows; its streams are closed then."""
        if process.status != CREATED:
            raise wrong_state(f"process {process.exec_id}: not in created state")
        if self.init.status != RUNNING:
            raise wrong_state(f"container {self.id}: not running")
        request = agent_pb2.ExecProcessRequest(**process.ids)
        document = dict(process.spec)
        for name in ("apparmorProfile", "selinuxLabel"):
            document.pop(name, None)
        document["terminal"] = process.terminal
        fill_known(request.process, document)
        await process.open()
        try:
            await self._pod.rpc.ExecProcess(request, timeout=CALL_TIMEOUT)
        except BaseException:
            process.status = STOPPED
            await process.close()
            raise

    async def update(self, resources: dict[str, Any]) -> None:
        """Change its limits, and those of the VM that ends with it.  Raises the errors that status_of knows."""
        request = agent_pb2.UpdateContainerRequest(container_id=self.id)
        fill_known(request.resources, guest_resources(resources))
        await self._pod.rpc.UpdateContainer(request, timeout=CALL_TIMEOUT)
        if self.owner:
            await self._pod.limit(resources)

    async def execs_ended(self) -> None:
        """Wait for the exits of the other processes, which the kernel has killed with init."""
        running = [process.exited.wait() for process in self.execs.values() if process.status == RUNNING]
        if running:
            await asyncio.wait([asyncio.ensure_future(one) for one in running], timeout=EXECS_TIMEOUT)

    async def kill_all(self, number: int) -> None:
        """Send a signal to every process.  Raises ShimError."""
        if self.init.status == STOPPED:
            raise finished()
        request = agent_pb2.SignalProcessRequest(container_id=self.id, exec_id="", signal=number)
        await self._pod.rpc.SignalProcess(request, timeout=CALL_TIMEOUT)

    async def remove(self, *, guest_ends: bool) -> None:
        """Remove it from the guest, unless the guest stops with it, and unmount its mounts on the host.

        Raises ShimError if it is running.
        """
        if self.init.status == RUNNING:
            raise wrong_state(f"container {self.id}: cannot be deleted while it runs")
        for process in (*self.execs.values(), self.init):
            await process.close()
        if self._disks.plugged or not guest_ends:  # what is written to a disk is on it once it is unmounted
            await self._remove_from_guest()
        if guest_ends:
            await self._pod.release()
        else:
            await asyncio.to_thread(self._disks.unplug)
        await asyncio.to_thread(self.unmount)
        await self._run_hooks("poststop")

    async def _remove_from_guest(self) -> None:
        request = agent_pb2.RemoveContainerRequest(container_id=self.id)
        try:
            await self._pod.rpc.RemoveContainer(request, timeout=CALL_TIMEOUT)
            stale = agent_pb2.RemoveStaleVirtiofsShareMountsRequest()
            await self._pod.rpc.RemoveStaleVirtiofsShareMounts(stale, timeout=CALL_TIMEOUT)
        except (RpcError, ConnectionClosed):
            pass  # the VM has exited

    def unmount(self) -> None:
        """Unmount its mounts on the host.  Idempotent."""
        mounts.release(self._pod.shared / self.id)
        mounts.unmount_rootfs(self.bundle.path)

"""containerd's Sandbox service: a pod that exists before its containers, and without a pause container.

Source: containerd, api/runtime/sandbox/v1/sandbox.proto; docs of `sandboxer = "shim"` (containerd 2.x).
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from caisson.agent.base.aio import runs_to_completion
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.shim.bundle import CONTAINER_TYPE, TaskBundle
from caisson.agent.shim.errors import ShimError, not_found
from caisson.agent.shim.events import stamp
from caisson.agent.shim.task import TaskService
from caisson.proto.containerd import cri_pb2, sandbox_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READY, NOT_READY = "SANDBOX_READY", "SANDBOX_NOTREADY"


class SandboxService:
    """The one sandbox of this shim.  It shares its pod with the Task service, which creates containers in it."""

    def __init__(self, task: TaskService, shut_down: Callable[[], None]) -> None:
        self._task = task
        self._shut_down = shut_down
        self._bundle: TaskBundle | None = None
        self._document: dict[str, Any] = {}
        self._created_at = self._exited_at = 0  # nanoseconds since the epoch
        self._ended = asyncio.Event()

    async def CreateSandbox(self, request: Any) -> Any:
        if self._bundle is not None:
            raise ShimError(StatusCode.ALREADY_EXISTS, f"sandbox {request.sandbox_id}: already exists")
        config = config_of(request)
        self._document = document_of(request, config)
        self._bundle = TaskBundle(request.bundle_path, request.sandbox_id)
        self._document["mounts"] = write_files(self._bundle.path, config)
        return sandbox_pb2.CreateSandboxResponse()

    def _known(self, request: Any) -> TaskBundle:
        if self._bundle is None or request.sandbox_id != self._bundle.id:
            raise not_found(f"sandbox {request.sandbox_id}")
        return self._bundle

    @runs_to_completion
    async def StartSandbox(self, request: Any) -> Any:
        bundle = self._known(request)
        if self._created_at:
            raise ShimError(StatusCode.FAILED_PRECONDITION, f"sandbox {request.sandbox_id}: is started already")
        pod = await self._task.start_sandbox(bundle, self._document)
        self._created_at = time.time_ns()
        response = sandbox_pb2.StartSandboxResponse(pid=pod.pid)
        stamp(response.created_at, self._created_at)
        return response

    async def Platform(self, request: Any) -> Any:
        response = sandbox_pb2.PlatformResponse()
        machine = os.uname().machine
        response.platform.os = "linux"
        response.platform.architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
        return response

    @runs_to_completion
    async def StopSandbox(self, request: Any) -> Any:
        if self._bundle is not None:
            await self._task.close()
            self._note_end()
        return sandbox_pb2.StopSandboxResponse()

    def _note_end(self) -> None:
        if not self._ended.is_set():
            self._exited_at = time.time_ns()
            self._ended.set()

    async def WaitSandbox(self, request: Any) -> Any:
        self._known(request)
        if (pod := self._task.pod) is not None:
            waits = [asyncio.ensure_future(one.wait()) for one in (self._ended, pod.lost)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in waits:
                    one.cancel()
            self._note_end()
        response = sandbox_pb2.WaitSandboxResponse()
        stamp(response.exited_at, self._exited_at)
        return response

    async def SandboxStatus(self, request: Any) -> Any:
        self._known(request)
        pod = self._task.pod
        ready = pod is not None and not pod.lost.is_set()
        response = sandbox_pb2.SandboxStatusResponse(
            sandbox_id=request.sandbox_id,
            pid=pod.pid if pod is not None else 0,
            state=READY if ready else NOT_READY,
        )
        stamp(response.created_at, self._created_at)
        if self._exited_at:
            stamp(response.exited_at, self._exited_at)
        return response

    async def PingSandbox(self, request: Any) -> Any:
        self._known(request)
        if self._task.pod is None or self._task.pod.lost.is_set():
            raise ShimError(StatusCode.UNAVAILABLE, "the VM has ended")
        return sandbox_pb2.PingResponse()

    async def ShutdownSandbox(self, request: Any) -> Any:
        await self.StopSandbox(request)
        self._shut_down()
        return sandbox_pb2.ShutdownSandboxResponse()

    async def SandboxMetrics(self, request: Any) -> Any:
        self._known(request)
        raise ShimError(StatusCode.UNIMPLEMENTED, "metrics of a sandbox: not implemented; ask for its containers'")


def config_of(request: Any) -> cri_pb2.PodSandboxConfig:
    """Return the kubelet's configuration from CreateSandbox's options.  Raises ShimError."""
    config = cri_pb2.PodSandboxConfig()
    if request.options.type_url.endswith("PodSandboxConfig"):
        try:
            config.ParseFromString(request.options.value)
        except ValueError as error:
            raise ShimError(StatusCode.INVALID_ARGUMENT, f"options: not a PodSandboxConfig: {error}") from error
    return config


def document_of(request: Any, config: cri_pb2.PodSandboxConfig) -> dict[str, Any]:
    """Return the configuration of an equivalent pause container."""
    limits = config.linux.resources
    cpu = {"quota": limits.cpu_quota, "period": limits.cpu_period, "shares": limits.cpu_shares}
    parent = config.linux.cgroup_parent
    network = {"type": "network", "path": request.netns_path} if request.netns_path else {"type": "network"}
    return {
        "hostname": config.hostname,
        "annotations": {**config.annotations, **request.annotations, CONTAINER_TYPE: "sandbox"},
        "linux": {
            "namespaces": [network, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}],
            "sysctl": dict(config.linux.sysctls),
            "resources": {"memory": {"limit": limits.memory_limit_in_bytes}, "cpu": cpu},
            "cgroupsPath": _below(parent, request.sandbox_id) if parent else "",
        },
    }


def write_files(directory: Path, config: cri_pb2.PodSandboxConfig) -> list[dict[str, Any]]:
    """Write the files that containerd creates only for other sandboxes, and return their mounts, for every container.

    Settings that the kubelet leaves open are the host's.  Raises OSError.
    """
    texts = {"hostname": f"{config.hostname}\n" if config.hostname else "", "hosts": "", "resolv.conf": ""}
    if config.HasField("dns_config"):
        dns = config.dns_config
        lines = [f"search {' '.join(dns.searches)}"] if dns.searches else []
        lines += [f"nameserver {server}" for server in dns.servers]
        lines += [f"options {' '.join(dns.options)}"] if dns.options else []
        texts["resolv.conf"] = "".join(f"{line}\n" for line in lines)
    mounts = []
    for name, text in texts.items():
        of_host = Path("/etc") / name
        if not text and not of_host.is_file():
            continue
        (directory / name).write_text(text or of_host.read_text())
        (directory / name).chmod(0o644)
        mounts.append({
            "destination": str(of_host), "type": "bind", "source": str(directory / name), "options": ["rbind"],
        })  # fmt: skip
    return mounts


def _below(parent: str, sandbox_id: str) -> str:
    if parent.endswith(".slice"):
        return f"{parent.rpartition('/')[2]}:cri-containerd:{sandbox_id}"
    return f"{parent}/{sandbox_id}"

"""A container whose root is on a disk that was plugged into the guest, with a layer over it that it may write to."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any

import grpc

from caisson.agent.client.connection import Agent, AgentError, Container
from caisson.agent.client.defaults import PATH, default_spec
from caisson.proto.kata1 import agent_pb2, oci_pb2

#: Where the guest mounts what is for containers, as Kata's hosts have it.
SHARED = "/run/kata-containers/shared/containers"

#: Seconds until a disk that was plugged in shows up: an emulated guest is slow, and its agent gives up sooner.
PATIENCE = 90.0


def image_spec(
    args: Sequence[str], *, env: Sequence[str] = (), user: str = "", cwd: str = "/", terminal: bool = False
) -> oci_pb2.Spec:
    """The specification of a container that an image says how to run, as engines have it; ``user`` is USER[:GROUP].

    Its root is said when it is created.  Of two settings of a variable the later one counts.
    """
    spec = default_spec("", args, cwd=cwd, terminal=terminal, scratch=())
    settings = dict(setting.partition("=")[::2] for setting in (PATH, *env))
    del spec.Process.Env[:]
    spec.Process.Env.extend(f"{name}={value}" for name, value in settings.items())
    spec.Process.User.Username = user or "0"
    spec.Process.NoNewPrivileges = False  # su and sudo are of use in an image that has them
    spec.Root.Readonly = False
    return spec


def storages(pci_path: str, place: str, fstype: str) -> list[Any]:
    """What the guest mounts: a disk at ``place``/lower, and on ``place``/root that with a tmpfs laid over it.

    The drivers are those whose source is taken as it is; "local" makes directories.
    """
    lower, upper, work = f"{place}/lower", f"{place}/layer/upper", f"{place}/layer/work"
    layers = [f"lowerdir={lower}", f"upperdir={upper}", f"workdir={work}"]
    wanted = (
        ("blk", pci_path, fstype, lower, ["ro", "nodev"]),
        ("mmioblk", "tmpfs", "tmpfs", f"{place}/layer", ["mode=0700"]),
        ("local", "local", "local", upper, ["mode=0755"]),
        ("local", "local", "local", work, ["mode=0755"]),
        ("mmioblk", "overlay", "overlay", f"{place}/root", layers),
    )
    return [
        agent_pb2.Storage(driver=driver, source=source, fstype=kind, mount_point=point, options=options)
        for driver, source, kind, point, options in wanted
    ]


async def create(agent: Agent, container_id: str, spec: oci_pb2.Spec, pci_path: str, fstype: str) -> Container:
    """Create a container on a disk, which is waited for.  Raises AgentError."""
    # Of its own each time: "local" directories are remembered until the sandbox's end, a layer ends with its container.
    place = f"{SHARED}/{uuid.uuid4().hex}"
    spec.Root.Path = f"{place}/root"
    request = agent_pb2.CreateContainerRequest(
        container_id=container_id, exec_id=container_id, OCI=spec, storages=storages(pci_path, place, fstype)
    )
    await agent.create_sandbox()
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            await agent.rpc.CreateContainer(request)
            return agent.container(container_id)
        except AgentError as error:
            if error.code is not grpc.StatusCode.DEADLINE_EXCEEDED or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0)  # it has waited there

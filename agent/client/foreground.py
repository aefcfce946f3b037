"""Run programs in containers for a command line: their streams and exit status are the caller's."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence
from typing import Any

import grpc

from caisson.agent.client.attach import attach
from caisson.agent.client.connection import Agent, AgentError, Container
from caisson.agent.client.guest import Guest, Machine
from caisson.agent.client.specs import PATH, terminal_env
from caisson.proto.kata1 import agent_pb2, oci_pb2

#: Where the guest mounts storages of containers, as Kata's hosts do.
SHARED = "/run/kata-containers/shared/containers"

#: Seconds for a plugged disk to show up: an emulated guest is slow, and its agent gives up sooner.
PLUG_TIMEOUT = 90.0


async def execute(
    machine: Machine,
    container_id: str,
    words: Sequence[str],
    *,
    env: Sequence[str] = (),
    cwd: str = "/",
    user: tuple[int, int] = (0, 0),
    terminal: bool = False,
) -> int:
    """Run a program in a container, created on first use; returns its exit status.

    Raises ProgramError when it cannot be run, and as `attach` does.
    """
    uid, gid = user
    environment = [PATH, "HOME=/root" if uid == 0 else "HOME=/", *terminal_env(terminal), *env]
    async with Guest(machine) as guest:
        container = await guest.container(container_id)
        return await attach(await container.exec(words, env=environment, cwd=cwd, uid=uid, gid=gid, terminal=terminal))


async def run_image(
    machine: Machine, container_id: str, spec: oci_pb2.Spec, pci_path: str, *, detach: bool
) -> int | None:
    """Run a container whose root is on a plugged disk; returns its exit status, None when detached.

    Unless detached, the container is removed at its end.  Raises AgentError.
    """
    async with Agent.connect(machine.agent_socket) as agent:
        container = agent.container(container_id)
        running = False
        try:
            await create_on_disk(agent, container_id, spec, pci_path, "squashfs")
            await container.start()
            if detach:
                running = True
                return None
            return await attach(container.init(terminal=spec.Process.Terminal))
        finally:
            if not running:
                with contextlib.suppress(AgentError):
                    await container.remove()


async def create_on_disk(agent: Agent, container_id: str, spec: oci_pb2.Spec, pci_path: str, fstype: str) -> Container:
    """Create a container on a disk, waiting for the disk to show up.  Raises AgentError."""
    # Unique: the agent keeps "local" directories until the sandbox's end, a layer ends with its container.
    place = f"{SHARED}/{uuid.uuid4().hex}"
    spec.Root.Path = f"{place}/root"
    request = agent_pb2.CreateContainerRequest(
        container_id=container_id, exec_id=container_id, OCI=spec, storages=storages(pci_path, place, fstype)
    )
    await agent.create_sandbox()
    deadline = time.monotonic() + PLUG_TIMEOUT
    while True:
        try:
            await agent.rpc.CreateContainer(request)
            return agent.container(container_id)
        except AgentError as error:
            if error.code is not grpc.StatusCode.DEADLINE_EXCEEDED or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0)  # the agent has waited


def storages(pci_path: str, place: str, fstype: str) -> list[Any]:
    """Return the mounts of a writable root: the disk at ``place``/lower, an overlay with a tmpfs at ``place``/root.

    The drivers are ones whose source the agent takes as it is; "local" makes directories.
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

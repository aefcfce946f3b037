"""Mount a directory of the host, shared with the guest, in containers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from caisson.agent.client.connection import Agent
from caisson.agent.client.errors import AgentError
from caisson.agent.client.guest import Guest, Machine
from caisson.agent.rpc.codes import StatusCode
from caisson.proto.caisson import caisson_pb2

T = TypeVar("T")

#: Default parent of mount points in a container: most can write to /run.
SHARED = "/run/shared"

#: Seconds for a hot-plugged device to appear: an emulated guest is slow, and its agent gives up sooner.
PLUG_TIMEOUT = 90.0

#: Mount options of a file system on its virtio device.
OPTIONS = {"9p": ("trans=virtio", "version=9p2000.L", "msize=262144")}


async def mount(
    machine: Machine, container_id: str, fstype: str, tag: str, mount_point: str, *, writable: bool
) -> None:
    """Mount a share in a container; only the VM's default one is created on first use.  Raises AgentError."""
    options = [*OPTIONS.get(fstype, ()), "rw" if writable else "ro"]
    request = caisson_pb2.MountRequest(
        container_id=container_id, source=tag, fstype=fstype, mount_point=mount_point, options=options
    )
    async with Guest(machine) as guest:
        await guest.find_container(container_id)
        await when_plugged(lambda: guest.agent.guest.Mount(request))


async def when_plugged(call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call that needs a hot-plugged device until the guest has it.  Raises AgentError."""
    deadline = time.monotonic() + PLUG_TIMEOUT
    while True:
        try:
            return await call()
        except AgentError as error:
            if error.code is not StatusCode.DEADLINE_EXCEEDED or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0)  # the agent has already waited


async def unmount(agent: Agent, tag: str) -> None:
    """Unmount a share from all containers.  Raises AgentError."""
    await agent.guest.Unmount(caisson_pb2.UnmountRequest(source=tag))

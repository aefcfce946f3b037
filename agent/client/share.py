"""Directories of the host in containers: a share that the guest has, mounted where a container sees it."""

from __future__ import annotations

import asyncio
import time

import grpc

from caisson.agent.client.connection import Agent, AgentError
from caisson.agent.client.guest import Guest, Machine
from caisson.proto.caisson import caisson_pb2

#: Below here a container sees what is shared with it, unless somebody says otherwise: /run can be written in most.
SHARED = "/run/shared"

#: Seconds until a device that was plugged in shows up: an emulated guest is slow, and its agent gives up sooner.
PATIENCE = 90.0

#: What mounting 9p takes on a virtio device.
OPTIONS = {"9p": ("trans=virtio", "version=9p2000.L", "msize=262144")}


async def mount(
    machine: Machine, container_id: str, fstype: str, tag: str, mount_point: str, *, writable: bool
) -> None:
    """Mount a share in a running container, the default one if there is none of this id.  Raises AgentError."""
    options = [*OPTIONS.get(fstype, ()), "rw" if writable else "ro"]
    request = caisson_pb2.MountRequest(
        container_id=container_id, source=tag, fstype=fstype, mount_point=mount_point, options=options
    )
    async with Guest(machine) as guest:
        await guest.container(container_id)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                await guest.agent.guest.Mount(request)
                return
            except AgentError as error:
                if error.code is not grpc.StatusCode.DEADLINE_EXCEEDED or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0)  # it has waited there


async def unmount(agent: Agent, tag: str) -> None:
    """Let all containers go of a share.  Raises AgentError."""
    await agent.guest.Unmount(caisson_pb2.UnmountRequest(source=tag))

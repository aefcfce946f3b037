"""caisson.Guest: what this agent offers beside Kata's API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cached_property
from typing import Any

from google.protobuf import empty_pb2

from caisson.agent.base.aio import run_to_completion
from caisson.agent.guest.identity import identify
from caisson.agent.model.container import Container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.guest.container_mounts import ContainerMounts

EMPTY = empty_pb2.Empty()


class Own:
    """For guests that were made from a template, and for containers that run."""

    def __init__(self, container: Callable[[str], Container], hotplug_timeout: float) -> None:
        self._container = container
        self._hotplug_timeout = hotplug_timeout

    async def Identify(self, request: Any) -> Any:
        identify(request.hostname, request.machine_id)
        return EMPTY

    async def LoadModule(self, request: Any) -> Any:
        from caisson.agent.guest import modules

        await asyncio.to_thread(modules.need, (request.name,))
        return EMPTY

    @cached_property
    def _mounts(self) -> ContainerMounts:
        from caisson.agent.guest.container_mounts import ContainerMounts

        return ContainerMounts(self._container, self._hotplug_timeout)

    async def Mount(self, request: Any) -> Any:
        where = request.container_id, request.source, request.fstype, request.mount_point
        await run_to_completion(self._mounts.mount(*where, tuple(request.options)))
        return EMPTY

    async def Unmount(self, request: Any) -> Any:
        await run_to_completion(self._mounts.unmount(request.source))
        return EMPTY

"""Compose the services beside Health: the model of sandbox and containers, and the API adapters over it.

Most of the agent's imports are here; none is needed for the first Health response.
"""

from __future__ import annotations

import asyncio
import os
from functools import cached_property
from importlib import import_module
from pathlib import Path

from caisson.agent.api.caisson import CaissonService
from caisson.agent.base.errors import ModelError
from caisson.agent.base.limits import raise_open_files
from caisson.agent.guest import modules
from caisson.agent.guest.files import Files, Trees
from caisson.agent.libcontainer import cgroups
from caisson.agent.libcontainer.process.fork_server import ForkServer
from caisson.agent.libcontainer.process.launcher import ProcessLauncher
from caisson.agent.libcontainer.process.nsexec import Nsexec
from caisson.agent.libcontainer.process.starter import Starter
from caisson.agent.model.sandbox import Sandbox
from caisson.agent.model.waits import AsyncioWaits
from caisson.agent.rpc.dispatch import Service
from caisson.proto.caisson import caisson_pb2
from caisson.proto.contract import GUEST_SHARED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from socket import socket

    from caisson.agent.base.boot_timestamps import BootTimestamps
    from caisson.agent.base.log import Log
    from caisson.agent.base.tracing import Tracing
    from caisson.agent.model.reaper import Reaper
    from caisson.agent.options import Options
    from caisson.agent.rpc.dispatch import Method

#: Kernel modules loaded before the first container: overlayfs, and the random number generator, so that clones of a
#: snapshot do not share their random numbers.
MODULES = ("overlay", "virtio_rng")

#: Imports of a pod's first containers: after the first response, but before a guest is saved.
FIRST_CONTAINERS = (
    "guest.devices", "guest.network", "guest.ps", "guest.resources", "guest.rootdisk", "guest.storage",
    "guest.storage.ephemeral", "guest.storage.overlay", "guest.storage.ownership", "guest.storage.storages",
    "libcontainer.cgroups.cpuset", "libcontainer.cgroups.device_program", "libcontainer.cgroups.events",
    "libcontainer.cgroups.stats", "libcontainer.cgroups.v2.settings", "libcontainer.cgroups.v2.stats",
    "libcontainer.process.hooks", "libcontainer.process.seccomp_bpf", "model.output_log",
)  # fmt: skip

GUEST = Service(caisson_pb2.DESCRIPTOR.services_by_name["Guest"], CaissonService)


class Services:
    """The agent's methods: ``grpc`` for hosts that speak gRPC, ``ttrpc`` for those that speak ttrpc.

    Each table is built, and its API generation imported, when a host first calls a method beyond Health.
    """

    def __init__(
        self,
        options: Options,
        reaper: Reaper,
        log: Log,
        tracing: Tracing,
        timestamps: BootTimestamps,
        stop: Callable[[], object],
    ) -> None:
        """``stop`` makes the agent exit once all calls are answered.  Raises OSError if nsexec is not available."""
        try:
            modules.load_available(MODULES)
        except ModelError as error:
            log("error", "kernel modules are missing; some containers will fail", error=str(error))
        self._tracing = tracing
        self._nsexec = Nsexec.seal(Path(options.nsexec))
        waits = AsyncioWaits()
        self._launcher = ProcessLauncher(
            Starter(
                self._nsexec, reaper, waits, log, verbose=log.enabled("debug"), server=ForkServer(self._nsexec, reaper)
            )
        )
        self._sandbox = Sandbox(
            self._launcher,
            cgroups.find(options.cgroup, options.cgroup_parent, waits, bounded=True),
            Path(options.state),
            log,
            open_files=raise_open_files(),
            pipe_size=options.pipe_size,
            hotplug_timeout=options.hotplug_timeout,
        )
        self._files, self._trees = Files(), Trees(GUEST_SHARED)
        self._options, self._reaper, self._stop = options, reaper, stop
        self._log = log
        self._guest = GUEST.bind(CaissonService(self._sandbox, options.hotplug_timeout, timestamps))

    @cached_property
    def grpc(self) -> dict[str, Method]:
        """The methods for hosts that speak gRPC: Kata 1.x, and our own clients."""
        from caisson.agent.api.kata1.guest import GuestService
        from caisson.agent.api.kata1.service import AgentService
        from caisson.agent.api.kata1.services import AGENT

        kata1 = AGENT.bind(
            AgentService(self._sandbox, init=os.getpid() == 1),
            GuestService(
                self._options.hotplug_timeout,
                self._files,
                self._log,
                self._sandbox.allow_hotplugged_cpus,
                self._tracing,
            ),
        )
        return {**kata1, **self._guest}

    @cached_property
    def ttrpc(self) -> dict[str, Method]:
        """The methods for hosts that speak ttrpc: Kata 3.x, and our own clients."""
        from caisson.agent.api.kata3.guest import GuestService
        from caisson.agent.api.kata3.service import AgentService
        from caisson.agent.api.kata3.services import AGENT
        from caisson.agent.guest.blockdevices import BlockDevices

        kata3 = AGENT.bind(
            AgentService(self._sandbox, init=os.getpid() == 1, end=self._stop),
            GuestService(
                self._options.hotplug_timeout,
                self._trees,
                self._sandbox.allow_hotplugged_cpus,
                blocks=BlockDevices(self._options.hotplug_timeout),
                children=self._reaper,
            ),
        )
        return {**kata3, **self._guest}

    def load(self, protocols: Iterable[str]) -> None:
        """Build the tables for connected hosts in advance; without any, the table for current Kata hosts."""
        for protocol in tuple(protocols) or ("ttrpc",):
            getattr(self, protocol)

    @staticmethod
    def import_for_containers() -> None:
        """Import what the first containers need, so that clones of this guest need not."""
        for name in FIRST_CONTAINERS:
            import_module(f"caisson.agent.{name}")

    async def warm_up(self, connected: socket) -> None:
        """Start and end a pod over a connection to this agent, so that clones of this guest start theirs sooner."""
        from caisson.agent.api.warmup import warm_up

        try:
            await warm_up(connected, self._options.nsexec)
        except Exception as error:  # the guest is as good without
            self._log("warning", "warming up failed", error=f"{type(error).__name__}: {error}")

    async def end(self) -> None:
        """Kill every container and release all resources."""
        await self._sandbox.destroy()
        if self._tracing.enabled:
            await asyncio.to_thread(self._tracing.stop)
        self._files.close()
        self._trees.close()
        self._nsexec.close()

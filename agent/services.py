"""What the agent serves beside Health: the model of sandbox and containers, and the API in front of it.

Most of what an agent imports is imported here, and nothing of it is needed for the first answer.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from caisson.agent.api.boot_times import BootTimes
from caisson.agent.api.caisson import Own
from caisson.agent.api.kata1.guest import GuestService
from caisson.agent.api.kata1.service import AgentService
from caisson.agent.base.errors import Refused
from caisson.agent.base.limits import raise_open_files
from caisson.agent.guest import modules
from caisson.agent.guest.files import Files
from caisson.agent.libcontainer import cgroups
from caisson.agent.libcontainer.process.launcher import ProcessLauncher
from caisson.agent.libcontainer.process.nsexec import Nsexec
from caisson.agent.model.sandbox import Sandbox
from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata1 import agent_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from caisson.agent.base.boot_timestamps import Marks
    from caisson.agent.base.log import Log
    from caisson.agent.base.tracing import Tracing
    from caisson.agent.model.reaper import Reaper
    from caisson.agent.options import Options

#: Modules of the kernel that are to be there before the first container: layers of file systems, and random numbers
#: that a guest made from a copy does not share with its siblings.
MODULES = ("overlay", "virtio_rng")


class Services:
    """``tables`` are the services, each with the objects of its methods."""

    def __init__(self, options: Options, reaper: Reaper, log: Log, tracing: Tracing, marks: Marks) -> None:
        """Raises OSError where nsexec is not to be had."""
        try:
            modules.need(MODULES)
        except Refused as error:
            log("error", "some containers will not work", error=str(error))
        self._tracing = tracing
        self._nsexec = Nsexec.seal(Path(options.nsexec))
        self._launcher = ProcessLauncher(self._nsexec, reaper, log, verbose=log.enabled("debug"))
        self._sandbox = Sandbox(
            self._launcher,
            cgroups.find(options.cgroup, options.cgroup_parent),
            Path(options.state),
            log,
            open_files=raise_open_files(),
            pipe_size=options.pipe_size,
            hotplug_timeout=options.hotplug_timeout,
        )
        self._files = Files()
        methods = [
            AgentService(self._sandbox, init=os.getpid() == 1),
            GuestService(options.hotplug_timeout, self._files, log, self._sandbox.allow_hotplugged_cpus, tracing),
        ]
        own = [Own(self._sandbox.container, options.hotplug_timeout), BootTimes(marks)]
        self.tables: list[tuple[Any, list[object]]] = [
            (agent_pb2.DESCRIPTOR.services_by_name["AgentService"], methods),
            (caisson_pb2.DESCRIPTOR.services_by_name["Guest"], own),
        ]

    async def end(self) -> None:
        """End every container, and let go of everything."""
        await self._sandbox.destroy()
        if self._tracing.enabled:
            await asyncio.to_thread(self._tracing.stop)
        self._files.close()
        await self._launcher.close()
        self._nsexec.close()

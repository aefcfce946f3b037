"""Follow one nsexec from its spawn to the process it becomes, including hooks, listener and scheduler."""

from __future__ import annotations

import os

from caisson.agent.libcontainer.errors import LaunchError, launch_error, reason
from caisson.agent.libcontainer.process.init_process import CLEANUP_TIMEOUT, InitProcess
from caisson.agent.libcontainer.waits import Deadline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from caisson.agent.libcontainer.process.children import Children
    from caisson.agent.libcontainer.process.fork_server import ForkServer
    from caisson.agent.libcontainer.process.hooks import RuntimeHooks
    from caisson.agent.libcontainer.process.launch import Launch, Stdio
    from caisson.agent.libcontainer.process.listener import Listener
    from caisson.agent.libcontainer.process.net_devices import NetDevice
    from caisson.agent.libcontainer.process.nsexec import Nsexec
    from caisson.agent.libcontainer.waits import Waits

    Log = Callable[..., None]

LOG_INFO, LOG_DEBUG = "4", "5"  # logrus's, which nsexec knows


class Starter:
    """Spawn nsexec and follow it.

    `log(level, message, container=…)` gets its log lines, those of level debug only if `verbose`.  It is killed after
    `timeout` seconds; None waits forever.  `server` is the fork server, if any.
    """

    def __init__(
        self,
        nsexec: Nsexec,
        children: Children,
        waits: Waits,
        log: Log,
        *,
        timeout: float | None = 30.0,
        verbose: bool = True,
        server: ForkServer | None = None,
    ) -> None:
        self._nsexec = nsexec
        self.server = server
        self.children = children
        self.waits = waits
        self.log = log
        self.timeout = timeout
        self._verbose = verbose

    async def start(
        self,
        messages: Callable[[], bytes],
        kind: str,
        launch: Launch,
        passed: Mapping[str, int],
        *,
        terminal: bool,
        until_exec: bool,
        hooks: RuntimeHooks | None = None,
        devices: tuple[NetDevice, ...] = (),
        listener: Listener | None = None,
        scheduler: bytes | None = None,
        namespaces: int = 0,
        served: bool = False,
    ) -> InitProcess:
        """Return the process once it is set up, or with ``until_exec`` has executed its program.

        ``messages`` encodes what to send it, and is called while it is being cloned; ``kind`` is its type on the wire;
        ``passed`` are further descriptors by environment variable; ``served`` is whether the fork server can clone it,
        an init in ``namespaces`` (plan.init_namespaces).  Nothing is left on failure.  Raises LaunchError, and what
        ``messages`` raises.
        """
        with self.children.expecting():
            started = InitProcess(
                self.children,
                self.waits,
                lambda level, message: self.log(level, message, container=launch.container_id),
                terminal=terminal,
                announced=launch.announced,
            )
            channel = started.channel
            try:
                fds = {**channel.child_fds, **passed, **launch.cgroup_fds}
                settings = {
                    "_LIBCONTAINER_INITTYPE": kind,
                    "_LIBCONTAINER_LOGLEVEL": LOG_DEBUG if self._verbose else LOG_INFO,
                }
                until_end = until_exec and (listener, scheduler, launch.announced) == (None, None, None)
                if namespaces:
                    settings["_CAISSON_NAMESPACES"] = str(namespaces)
                if not served or not self._request(started, launch, fds, settings):
                    settings.pop("_CAISSON_NAMESPACES", None)
                    started.spawned(self._spawn(launch, fds, settings))
                started.send(messages, until_end=until_end)
                timeout = await self._run_hooks(started, hooks, devices)
                if listener is not None:
                    await self._pass_listener(started, listener, timeout)
                if scheduler is not None:
                    await self._set_scheduler(started, scheduler, timeout)
                await self._set_up(started, timeout, until_exec=until_exec)
                if terminal and channel.console < 0:
                    raise LaunchError("console: no terminal was received", step="console")
            except BaseException:
                await started.destroy()
                raise
        return started

    def _request(
        self, started: InitProcess, launch: Launch, fds: Mapping[str, int], settings: Mapping[str, str]
    ) -> bool:
        """Request the process from the fork server, if there is one; returns whether it creates it."""
        # It enters one cgroup, of version 2, and keeps only stdio.
        if self.server is None or launch.preserved or not {"_CAISSON_CGROUP"}.issuperset(launch.cgroup_fds):
            return False
        try:
            self.server.request(_numbers(launch.stdio), fds, settings)
        except OSError as error:
            self.log(
                "warning",
                f"fork server: {reason(error.errno or 0)}; nsexec is spawned instead",
                container=launch.container_id,
            )
            return False
        started.requested(self.server)
        return True

    def _spawn(self, launch: Launch, fds: Mapping[str, int], settings: Mapping[str, str]) -> int:
        env = {**{name: str(fd) for name, fd in fds.items()}, **settings}
        if launch.preserved:
            env["_CAISSON_PRESERVED"] = str(launch.preserved)
        try:
            return self._nsexec.spawn(_numbers(launch.stdio), [*fds.values(), *range(3, 3 + launch.preserved)], env)
        except OSError as error:
            raise LaunchError(
                f"spawn nsexec: {reason(error.errno or 0)}", step="spawn", errno=error.errno or 0
            ) from error

    async def _run_hooks(
        self, started: InitProcess, hooks: RuntimeHooks | None, devices: tuple[NetDevice, ...]
    ) -> float | None:
        """Do the runtime's part while nsexec waits before pivot_root; return the timeout for the rest."""
        channel = started.channel
        if devices or (hooks is not None and hooks.outside):
            await self._follow(started, lambda: channel.at_hooks or channel.ended, self.timeout)
        if channel.at_hooks:
            pid = (started.child or started.stages[-1]).pid
            if devices:
                from caisson.agent.libcontainer.process import net_devices

                net_devices.move(devices, pid)
            if hooks is not None:
                await hooks.run(pid)
            channel.release_init()
        if hooks is None:
            return self.timeout
        return with_hooks(self.timeout, hooks.create_timeout)

    async def _set_up(self, started: InitProcess, timeout: float | None, *, until_exec: bool) -> None:
        """Follow nsexec to the end of setup.  Raises LaunchError."""
        channel = started.channel
        await self._follow(started, lambda: channel.ended or (channel.ready and not until_exec), timeout)
        if channel.error is not None:
            raise channel.error
        if not channel.ready or started.child is None or channel.pidfd < 0:
            raise LaunchError(await self._exit_description(started), step="nsexec")

    async def _pass_listener(self, started: InitProcess, listener: Listener, timeout: float | None) -> None:
        """Pass on the filter's listener, before the process makes calls that it intercepts.

        If a pid namespace is joined, a stage outside has loaded the filter and creates the process: until that has a
        pid to report, notifications are answered here.
        """
        channel = started.channel
        await self._follow(started, lambda: channel.ended or channel.listener >= 0, timeout)
        if channel.listener < 0:
            return
        fd = listener.fetch(started.pidfds()[-1], channel.listener)
        deadline = Deadline(timeout)
        try:
            channel.release_init()
            while started.child is None and not channel.ended:
                if deadline.left == 0 or not await self.waits.readable(channel.fileno(), fd, seconds=deadline.left):
                    raise too_late(timeout)
                # The pid arrives before any notification of the process itself: earlier ones are the stage's.
                asks = await self.waits.readable(fd, seconds=0)
                channel.on_readable()
                if asks and started.child is None:
                    listener.let_through(fd)
            if started.child is not None:
                given, fd, pid = fd, -1, started.child.pid
                await self.waits.work(lambda: listener.send(given, pid))
        finally:
            if fd >= 0:
                os.close(fd)

    async def _set_scheduler(self, started: InitProcess, attributes: bytes, timeout: float | None) -> None:
        """Set the scheduler that the clone could not inherit; the process waits for it.  Raises LaunchError."""
        channel = started.channel
        await self._follow(started, lambda: channel.ended or started.child is not None, timeout)
        if started.child is None:
            return
        from caisson.agent.base import syscalls

        try:
            syscalls.sched_setattr(started.child.pid, attributes)
        except OSError as error:
            raise launch_error("scheduler", "", error.errno or 0, "") from error
        channel.release_init()

    async def _follow(self, started: InitProcess, reached: Callable[[], bool], timeout: float | None) -> None:
        if not await started.channel.follow(self.waits, reached, timeout):
            raise too_late(timeout)

    async def _exit_description(self, started: InitProcess) -> str:
        """Describe how an nsexec exited without a report."""
        last = started.child or (started.stages[-1] if started.stages else None)
        if last is None:
            return "nsexec could not be started"
        fds = started.pidfds()
        if not fds or not await self.waits.readable(fds[-1], seconds=CLEANUP_TIMEOUT):
            return "nsexec broke off"
        status = await last.wait()
        return f"nsexec was killed by signal {status - 128}" if status > 128 else f"nsexec ended with status {status}"


def _numbers(stdio: Stdio | None) -> tuple[int, int, int] | None:
    return None if stdio is None else (stdio.stdin, stdio.stdout, stdio.stderr)


def too_late(timeout: float | None) -> LaunchError:
    """Return the error of an nsexec that was killed on timeout."""
    return LaunchError(f"nsexec took longer than {timeout:g} s and was killed", step="nsexec")


def with_hooks(timeout: float | None, of_hooks: float | None) -> float | None:
    """Return nsexec's timeout including that of hooks; None for no limit."""
    return None if timeout is None or of_hooks is None else timeout + of_hooks

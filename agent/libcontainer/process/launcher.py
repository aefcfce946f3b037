"""Start processes in containers: create, start and exec, by way of nsexec."""

from __future__ import annotations

import os
import sys

from caisson.agent.base.record import NOTHING
from caisson.agent.libcontainer.errors import LaunchError, launch_error, reason
from caisson.agent.libcontainer.plan import plan, users
from caisson.agent.libcontainer.plan.wire import EncodingError
from caisson.agent.libcontainer.process import gate
from caisson.agent.libcontainer.process.channel import kill
from caisson.agent.libcontainer.process.init_process import CLEANUP_TIMEOUT, InitProcess
from caisson.agent.libcontainer.process.launch import Launch, Launched, Stdio, check_stdio, own_pipes
from caisson.agent.libcontainer.waits import Deadline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from caisson.agent.libcontainer.config.process import Process
    from caisson.agent.libcontainer.config.seccomp import Seccomp
    from caisson.agent.libcontainer.config.spec import Hooks, Spec
    from caisson.agent.libcontainer.intel_rdt import ResctrlGroup
    from caisson.agent.libcontainer.process.children import Child, Children
    from caisson.agent.libcontainer.process.hooks import HookRunner, RuntimeHooks
    from caisson.agent.libcontainer.process.listener import Listener
    from caisson.agent.libcontainer.process.net_devices import NetDevice
    from caisson.agent.libcontainer.process.nsexec import Nsexec
    from caisson.agent.libcontainer.process.seccomp_bpf import Filters
    from caisson.agent.libcontainer.waits import Waits

    Log = Callable[..., None]

LOG_INFO, LOG_DEBUG = "4", "5"  # logrus's, which nsexec knows


class ProcessLauncher:
    """Make processes in containers.

    `log(level, message, container=…)` gets nsexec's own lines, without `verbose` none of the level debug.  nsexec is
    killed when it takes longer than `timeout` seconds; None waits for ever.
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
    ) -> None:
        self._nsexec = nsexec
        self._children = children
        self._waits = waits
        self._log = log
        self._timeout = timeout
        self._verbose = verbose
        self._filters: Filters | None = None

    async def filter(self, profile: Seccomp | None) -> bytes:
        """Compile a system call filter; empty without a profile.  Raises SpecError."""
        if profile is None:
            return b""
        from caisson.agent.libcontainer.process.seccomp_bpf import Filters  # late: most processes have none

        if self._filters is None:
            self._filters = Filters(self._waits)
        return await self._filters.program(profile)

    async def create(
        self,
        spec: Spec,
        launch: Launch,
        *,
        bundle: str,
        rootfs: str,
        join: Mapping[str, str],
        start_gate: str,
        cgroups: Mapping[str, str] = NOTHING,
        procfs: str | None = None,
        filter: bytes = b"",
        hooks: RuntimeHooks | None = None,
    ) -> Launched:
        """Set up a container's first process up to where it waits at `start_gate`, which is made here (gate.py).

        `join` maps namespace types to paths to join; `cgroups` are the container's cgroup directories by controllers;
        `procfs` is a mount of the pid namespace's procfs, if one is joined; `filter` is of system calls; `hooks` run as
        the configuration wants them.  On failure nothing is left.  Raises SpecError or LaunchError.
        """
        if spec.process is not None:
            # Here: nothing of the container runs yet that could serve these files itself.
            spec = spec.but(process=users.look_up(spec.process, rootfs))
        process = spec.process
        devices = _net_devices(spec)
        map_programs, setgroups = users.map_writers(spec.linux)
        messages = _encode(
            lambda: plan.init_messages(
                spec,
                rootfs=rootfs,
                bundle=bundle,
                join=join,
                cgroups=cgroups,
                procfs=procfs,
                hook_state="" if hooks is None else hooks.state,
                filter=filter,
                net_requests=[(device.name, request) for device in devices for request in device.requests],
                map_programs=map_programs,
                setgroups=setgroups,
                pivot=launch.pivot,
                keyring=launch.keyring,
                on_host=launch.on_host,
            )
        )
        if filter:
            flags = int.from_bytes(filter[:4], sys.byteorder)
            self._log("debug", f"seccomp filter flags: {flags}", container=launch.container_id)
        terminal = process is not None and process.terminal
        check_stdio(terminal, launch.stdio)
        own_pipes(launch.stdio, spec)
        # Where others may look at it while it waits, it is not given anything that is the runtime's.
        in_company = "pid" in plan.joined_paths(spec.linux, join)
        name, gate_fd = gate.make(start_gate, in_company=in_company)
        group = _rdt_group(spec, launch.container_id)
        try:
            if group is not None:
                group.make()
            started = await self._launch(
                messages,
                "standard",
                _also_in(launch, group),
                {name: gate_fd},
                terminal=terminal,
                until_exec=False,
                hooks=hooks,
                devices=devices,
                listener=_listener(spec, launch.container_id, bundle),
                scheduler=None if process is None or not in_company else _late_scheduler(process),
            )
        except BaseException:
            gate.remove(start_gate)
            if group is not None:
                group.remove()
            raise
        finally:
            os.close(gate_fd)
        return _launched(started)

    async def exec(
        self,
        process: Process,
        launch: Launch,
        *,
        spec: Spec,
        init_pid: int,
        pidfd: int,
        join: Mapping[str, str],
        filter: bytes = b"",
        bundle: str = "",
        rootfs: str = "",
    ) -> Launched:
        """Run another process in all namespaces of a container; it has been executed when this returns.

        `pidfd` and `init_pid` are the container's first process; `rootfs` is its root as this program has it, for one
        that may not wait for a container's files; what the process does not say (capabilities, limits,
        no_new_privs) is as for that one.  Raises SpecError or LaunchError.
        """
        check_stdio(process.terminal, launch.stdio)
        own_pipes(launch.stdio, spec)
        # Its root as it is now; the caller has checked that the pid is still its own.
        process = await self._with_user(process, f"/proc/{init_pid}/root", rootfs)
        messages = _encode(lambda: plan.exec_messages(process, spec, join, filter))
        joins_pids = any(namespace.type == "pid" for namespace in spec.linux.namespaces) or "pid" in join
        started = await self._launch(
            messages,
            "setns",
            _also_in(launch, _rdt_group(spec, launch.container_id)),
            {"_CAISSON_PIDFD": pidfd},
            terminal=process.terminal,
            until_exec=True,
            listener=_listener(spec, launch.container_id, bundle, init_pid),
            scheduler=_late_scheduler(process, spec.process) if joins_pids else None,
        )
        return _launched(started)

    async def _with_user(self, process: Process, root: str, rootfs: str) -> Process:
        """Look its user up in the container's files, which the container may serve itself.  Raises SpecError."""
        if not users.needs_files(process):
            return process
        if rootfs and (known := users.look_up_at_once(process, root, rootfs)) is not None:
            return known
        try:
            return await self._waits.work(lambda: users.look_up(process, root), seconds=self._timeout)
        except TimeoutError:
            raise LaunchError(
                f"process.user: the container's /etc/passwd was not read within {self._timeout:g} s", step="user"
            ) from None

    async def start(self, start_gate: str, pid: int, hooks: Hooks, pidfd: int = -1) -> None:
        """Let a created init go on to its program, and return once that has been executed.

        Raises LaunchError if the init is gone, was started before, or its program could not be executed; an init that
        takes too long, its startContainer hooks aside, is killed.
        """
        opened = os.pidfd_open(pid) if pidfd < 0 else -1
        timeout: float | None = self._timeout
        if hooks.start_container:
            from caisson.agent.libcontainer.process.hooks import total_timeout

            timeout = self._with(total_timeout(hooks.start_container))
        try:
            await gate.open_and_follow(start_gate, pid, max(pidfd, opened), self._waits, timeout)
        except TimeoutError:
            kill(max(pidfd, opened))
            raise _too_late(timeout) from None
        finally:
            if opened >= 0:
                os.close(opened)

    @property
    def hooks(self) -> HookRunner:
        """Who runs hooks in the runtime's namespaces."""
        from caisson.agent.libcontainer.process.hooks import HookRunner  # late: most containers have none

        return HookRunner(self._children, self._waits)

    def runtime_hooks(self, spec: Spec, container_id: str, bundle: str) -> RuntimeHooks:
        """Return the hooks of a configuration while its container is created."""
        from caisson.agent.libcontainer.process.hooks import RuntimeHooks

        return RuntimeHooks(self.hooks, spec, container_id, bundle)

    async def pause(self, procfs: str, rootfs: str, join: Mapping[str, str]) -> Child:
        """Start the first process of a new pid namespace, which only reaps; it ends by SIGKILL, or with its parent.

        The namespace's procfs is mounted on the directory `procfs`; `rootfs` is an empty one; `join` maps namespace
        types to paths to join.  Raises LaunchError.
        """
        target = os.open(procfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        ends = os.pipe2(os.O_CLOEXEC)  # for stdio, which it closes
        try:
            started = await self._launch(
                plan.pause_messages(rootfs, join),
                "pause",
                Launch("pause", Stdio(ends[0], ends[1], ends[1])),
                {"_CAISSON_PROCFS": target},
                terminal=False,
                until_exec=True,
            )
        finally:
            for fd in (target, *ends):
                os.close(fd)
        launched = _launched(started)
        os.close(launched.pidfd)
        return launched.child

    async def _launch(
        self,
        messages: bytes,
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
    ) -> InitProcess:
        """Spawn nsexec and follow it until it is ready (and has executed its program).  Nothing is left on failure."""
        with self._children.expecting():
            started = InitProcess(
                self._children,
                self._waits,
                lambda level, message: self._log(level, message, container=launch.container_id),
                terminal=terminal,
                announced=launch.announced,
            )
            channel = started.channel
            try:
                fds = {**channel.child_fds, **passed, **launch.cgroup_fds}
                env = {name: str(fd) for name, fd in fds.items()}
                env["_LIBCONTAINER_INITTYPE"] = kind
                env["_LIBCONTAINER_LOGLEVEL"] = LOG_DEBUG if self._verbose else LOG_INFO
                if launch.preserved:
                    env["_CAISSON_PRESERVED"] = str(launch.preserved)
                channel.send(messages)
                self._spawn(started, launch, list(fds.values()), env)
                timeout = await self._run_hooks(started, hooks, devices)
                if listener is not None:
                    await self._pass_listener(started, listener, timeout)
                if scheduler is not None:
                    await self._set_scheduler(started, scheduler, timeout)
                await self._set_up(started, timeout, until_exec=until_exec)
                if terminal and channel.console < 0:
                    raise LaunchError("console: no terminal came", step="console")
            except BaseException:
                await started.destroy()
                raise
        return started

    def _spawn(self, started: InitProcess, launch: Launch, passed: Sequence[int], env: Mapping[str, str]) -> None:
        stdio = launch.stdio
        try:
            pid = self._nsexec.spawn(
                None if stdio is None else (stdio.stdin, stdio.stdout, stdio.stderr),
                [*passed, *range(3, 3 + launch.preserved)],
                env,
            )
        except OSError as error:
            raise LaunchError(
                f"spawn nsexec: {reason(error.errno or 0)}", step="spawn", errno=error.errno or 0
            ) from error
        started.spawned(pid)

    async def _run_hooks(
        self, started: InitProcess, hooks: RuntimeHooks | None, devices: tuple[NetDevice, ...]
    ) -> float | None:
        """Do what belongs to the runtime while nsexec waits before pivot_root; return the time-out of what follows."""
        channel = started.channel
        if devices or (hooks is not None and hooks.outside):
            await self._follow(started, lambda: channel.at_hooks or channel.ended, self._timeout)
        if channel.at_hooks:
            pid = (started.child or started.stages[-1]).pid
            if devices:
                from caisson.agent.libcontainer.process import net_devices

                net_devices.move(devices, pid)
            if hooks is not None:
                await hooks.run(pid)
            channel.release_init()
        if hooks is None:
            return self._timeout
        return self._with(hooks.create_timeout)

    def _with(self, seconds: float | None) -> float | None:
        """Return the time that nsexec may take, with that of hooks; None for ever."""
        return None if seconds is None or self._timeout is None else self._timeout + seconds

    async def _set_up(self, started: InitProcess, timeout: float | None, *, until_exec: bool) -> None:
        """Follow nsexec to the end of the set-up.  Raises LaunchError."""
        channel = started.channel
        await self._follow(started, lambda: channel.ended or (channel.ready and not until_exec), timeout)
        if channel.error is not None:
            raise channel.error
        if not channel.ready or started.child is None or channel.pidfd < 0:
            raise LaunchError(await self._obituary(started), step="nsexec")

    async def _pass_listener(self, started: InitProcess, listener: Listener, timeout: float | None) -> None:
        """Pass on the listener of the filter, before the process does what that may ask about.

        Where a pid namespace is joined it is a stage outside that has loaded the filter, and makes the process: until
        that has a pid to be told of, what it asks about is answered here.
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
                if deadline.left == 0 or not await self._waits.readable(channel.fileno(), fd, seconds=deadline.left):
                    raise _too_late(timeout)
                # The pid comes before anything that the process itself asks about: what waited before is the stage's.
                asks = await self._waits.readable(fd, seconds=0)
                channel.on_readable()
                if asks and started.child is None:
                    listener.let_through(fd)
            if started.child is not None:
                pid = started.child.pid
                await self._waits.work(lambda: listener.send(fd, pid))
        finally:
            os.close(fd)

    async def _set_scheduler(self, started: InitProcess, attributes: bytes, timeout: float | None) -> None:
        """Give the process the scheduler that its clone could not have; it waits for that.  Raises LaunchError."""
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
        if not await started.channel.follow(self._waits, reached, timeout):
            raise _too_late(timeout)

    async def _obituary(self, started: InitProcess) -> str:
        """Say what happened to an nsexec that ended without a report."""
        last = started.child or (started.stages[-1] if started.stages else None)
        if last is None:
            return "nsexec could not be started"
        fds = started.pidfds()
        if not fds or not await self._waits.readable(fds[-1], seconds=CLEANUP_TIMEOUT):
            return "nsexec broke off"
        status = await last.wait()
        return f"nsexec was killed by signal {status - 128}" if status > 128 else f"nsexec ended with status {status}"


def _too_late(timeout: float | None) -> LaunchError:
    return LaunchError(f"nsexec took longer than {timeout:g} s and was killed", step="nsexec")


def _launched(started: InitProcess) -> Launched:
    assert started.child is not None
    console, pidfd = started.channel.take_console(), started.channel.take_pidfd()
    launched = Launched(started.child, console, pidfd, tuple(started.stages))
    started.close()
    return launched


def _late_scheduler(process: Process, init: Process | None = None) -> bytes | None:
    """Return the scheduler of a process in a joined pid namespace, if it does not survive the clone into that."""
    attributes = process.scheduler or (init.scheduler if init is not None else None)
    if attributes is None:
        return None
    from caisson.agent.libcontainer.config.scheduling import is_lost_by_clone

    return attributes if is_lost_by_clone(attributes) else None


def _rdt_group(spec: Spec, container_id: str) -> ResctrlGroup | None:
    """Return the container's group of resctrl, if it has one.  Raises LaunchError."""
    if spec.linux.intel_rdt is None:
        return None
    from caisson.agent.libcontainer.intel_rdt import ResctrlGroup  # late: next to nobody has one

    return ResctrlGroup(spec.linux.intel_rdt, container_id)


def _also_in(launch: Launch, group: ResctrlGroup | None) -> Launch:
    """Return the launch, whose process joins a group of resctrl before it runs."""
    if group is None:
        return launch
    also = launch.announced

    def announced(pid: int) -> None:
        group.add(pid)
        if also is not None:
            also(pid)

    return launch.but(announced=announced)


def _net_devices(spec: Spec) -> tuple[NetDevice, ...]:
    if not spec.linux.net_devices:
        return ()
    from caisson.agent.libcontainer.process import net_devices  # late: most containers have none

    return net_devices.find(spec.linux.net_devices)


def _listener(spec: Spec, container_id: str, bundle: str, init_pid: int = 0) -> Listener | None:
    """Find where the listener of the filter goes, if it has one."""
    if spec.linux.seccomp is None or not spec.linux.seccomp.listener_path:
        return None
    from caisson.agent.libcontainer.process.listener import Listener  # late: most containers have none

    return Listener(spec, container_id, bundle, init_pid)


def _encode(make: Callable[[], bytes]) -> bytes:
    try:
        return make()
    except EncodingError as error:
        raise LaunchError(str(error), step="encode") from error

"""Start processes in containers: create, start and exec, by way of nsexec."""

from __future__ import annotations

import os
import sys

from caisson.agent.base.record import NOTHING
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.plan import plan, users
from caisson.agent.libcontainer.plan.wire import EncodingError
from caisson.agent.libcontainer.process import gate
from caisson.agent.libcontainer.process.channel import kill
from caisson.agent.libcontainer.process.launch import Launch, Launched, Stdio, check_stdio, own_pipes
from caisson.agent.libcontainer.process.starter import Starter, too_late, with_hooks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from caisson.agent.libcontainer.config.process import Process
    from caisson.agent.libcontainer.config.seccomp import Seccomp
    from caisson.agent.libcontainer.config.spec import Hooks, Spec
    from caisson.agent.libcontainer.intel_rdt import ResctrlGroup
    from caisson.agent.libcontainer.process.children import Child, Children
    from caisson.agent.libcontainer.process.hooks import HookRunner, RuntimeHooks
    from caisson.agent.libcontainer.process.init_process import InitProcess
    from caisson.agent.libcontainer.process.listener import Listener
    from caisson.agent.libcontainer.process.net_devices import NetDevice
    from caisson.agent.libcontainer.process.nsexec import Nsexec
    from caisson.agent.libcontainer.process.seccomp_bpf import Filters
    from caisson.agent.libcontainer.waits import Waits

    Log = Callable[..., None]


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
        self.starter = Starter(nsexec, children, waits, log, timeout=timeout, verbose=verbose)
        self._children = children
        self._waits = waits
        self._log = log
        self._timeout = timeout
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
            started = await self.starter.start(
                messages,
                "standard",
                _also_in(launch, group),
                {name: gate_fd},
                terminal=terminal,
                until_exec=False,
                hooks=hooks,
                devices=devices,
                listener=_listener(spec, launch.container_id, bundle),
                scheduler=_late_scheduler(process, spec) if in_company and process is not None else None,
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
        messages = _encode(lambda: plan.exec_messages(process, spec, join, filter, on_host=launch.on_host))
        started = await self.starter.start(
            messages,
            "setns",
            _also_in(launch, _rdt_group(spec, launch.container_id)),
            {"_CAISSON_PIDFD": pidfd},
            terminal=process.terminal,
            until_exec=True,
            listener=_listener(spec, launch.container_id, bundle, init_pid),
            scheduler=_late_scheduler(process, spec, join),
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

            timeout = with_hooks(timeout, total_timeout(hooks.start_container))
        try:
            await gate.open_and_follow(start_gate, pid, max(pidfd, opened), self._waits, timeout)
        except TimeoutError:
            kill(max(pidfd, opened))
            raise too_late(timeout) from None
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
            started = await self.starter.start(
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


def _launched(started: InitProcess) -> Launched:
    assert started.child is not None
    console, pidfd = started.channel.take_console(), started.channel.take_pidfd()
    launched = Launched(started.child, console, pidfd, tuple(started.stages))
    started.close()
    return launched


def _late_scheduler(process: Process, spec: Spec, join: Mapping[str, str] = NOTHING) -> bytes | None:
    """Return the scheduler of a process in a joined pid namespace, if it does not survive the clone into that."""
    attributes = process.scheduler or (spec.process.scheduler if spec.process is not None else None)
    if attributes is None or not ("pid" in join or any(one.type == "pid" for one in spec.linux.namespaces)):
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

"""Start processes in containers through nsexec: create, start and exec."""

from __future__ import annotations

import os
import sys

from caisson.agent.libcontainer.config.spec import Hooks
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.plan import plan, users
from caisson.agent.libcontainer.plan.wire import EncodingError
from caisson.agent.libcontainer.process import gate
from caisson.agent.libcontainer.process.channel import kill
from caisson.agent.libcontainer.process.launch import Launch, Launched, Stdio, check_stdio, own_pipes
from caisson.agent.libcontainer.process.starter import Starter, too_late, with_hooks
from caisson.proto.record import NOTHING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from caisson.agent.libcontainer.config.process import Process
    from caisson.agent.libcontainer.config.seccomp import Seccomp
    from caisson.agent.libcontainer.config.spec import Spec
    from caisson.agent.libcontainer.intel_rdt import ResctrlGroup
    from caisson.agent.libcontainer.process.children import Child
    from caisson.agent.libcontainer.process.hooks import HookRunner, RuntimeHooks
    from caisson.agent.libcontainer.process.init_process import InitProcess
    from caisson.agent.libcontainer.process.listener import Listener
    from caisson.agent.libcontainer.process.net_devices import NetDevice


class ProcessLauncher:
    """Start processes in containers."""

    def __init__(self, starter: Starter) -> None:
        self.starter = starter
        self._log = starter.log

    async def filter(self, profile: Seccomp | None) -> bytes:
        """Compile a seccomp filter; empty without a profile.  Raises SpecError.

        In a thread: thousands of rules about one system call take seconds.
        """
        if profile is None:
            return b""
        from caisson.agent.libcontainer.process.seccomp_bpf import program  # late: few processes have one

        return await self.starter.waits.work(lambda: program(profile))

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
    ) -> Launched:
        """Set up a container's init process up to where it waits at `start_gate`, which is created here (gate.py).

        `join` maps namespace types to paths to join; `cgroups` are the container's cgroup directories by controllers;
        `procfs` is a mount of the pid namespace's procfs, if one is joined; `filter` is a seccomp filter.  Nothing is
        left on failure.  Raises SpecError or LaunchError.
        """
        process = spec.process
        devices = _net_devices(spec)
        map_programs, setgroups = users.map_writers(spec.linux)
        namespaces = plan.init_namespaces(spec, join)
        hooks = None if spec.hooks == Hooks() else self._runtime_hooks(spec, launch.container_id, bundle)

        def messages() -> bytes:
            # No process of the container is running yet that could serve the files of its users itself.
            found = None if process is None else users.look_up(process, rootfs)
            return _encode(
                plan.init_messages,
                spec.but(process=found),
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

        if filter:
            flags = int.from_bytes(filter[:4], sys.byteorder)
            self._log("debug", f"seccomp filter flags: {flags}", container=launch.container_id)
        terminal = process is not None and process.terminal
        check_stdio(terminal, launch.stdio)
        own_pipes(launch.stdio, spec)
        # If others can inspect it while it waits, it gets nothing that belongs to the runtime.
        in_company = "pid" in plan.joined_paths(spec.linux, join)
        group = _rdt_group(spec, launch.container_id)
        name, gate_fd = gate.make(start_gate, in_company=in_company)
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
                namespaces=namespaces,
                served=namespaces != 0,
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
        """Run another process in all namespaces of a container; returns once it has been executed.

        `pidfd` and `init_pid` are the container's init process; `rootfs` is its root as seen by this program, for a
        caller that must not block on a container's files; attributes that the process does not set (capabilities,
        limits, no_new_privs) are those of init.  Raises SpecError or LaunchError.
        """
        check_stdio(process.terminal, launch.stdio)
        own_pipes(launch.stdio, spec)
        # Its current root; the caller has checked that the pid is still its own.
        process = await self._with_user(process, f"/proc/{init_pid}/root", rootfs)
        started = await self.starter.start(
            lambda: _encode(plan.exec_messages, process, spec, join, filter, on_host=launch.on_host),
            "setns",
            _also_in(launch, _rdt_group(spec, launch.container_id)),
            {"_CAISSON_PIDFD": pidfd},
            terminal=process.terminal,
            until_exec=True,
            listener=_listener(spec, launch.container_id, bundle, init_pid),
            scheduler=_late_scheduler(process, spec, join),
            served=plan.messages_fit(spec),
        )
        return _launched(started)

    async def _with_user(self, process: Process, root: str, rootfs: str) -> Process:
        """Look up its user in the container's files, which the container may serve itself.  Raises SpecError."""
        if not users.needs_files(process):
            return process
        if rootfs and (known := users.look_up_at_once(process, root, rootfs)) is not None:
            return known
        try:
            return await self.starter.waits.work(lambda: users.look_up(process, root), seconds=self.starter.timeout)
        except TimeoutError:
            raise LaunchError(
                f"process.user: the container's /etc/passwd was not read within {self.starter.timeout:g} s", step="user"
            ) from None

    async def start(self, start_gate: str, pid: int, pidfd: int, hooks: Hooks) -> None:
        """Let a created init, by its pid and pidfd, execute its program, and return once it has.

        Raises LaunchError if the init has exited, was already started, or its program cannot be executed; an init that
        takes too long, not counting its startContainer hooks, is killed.
        """
        timeout: float | None = self.starter.timeout
        if hooks.start_container:
            from caisson.agent.libcontainer.process.hooks import total_timeout

            timeout = with_hooks(timeout, total_timeout(hooks.start_container))
        try:
            await gate.open_and_follow(start_gate, pid, pidfd, self.starter.waits, timeout)
        except TimeoutError:
            kill(pidfd)
            raise too_late(timeout) from None

    @property
    def hooks(self) -> HookRunner:
        """The runner of hooks in the runtime's namespaces."""
        from caisson.agent.libcontainer.process.hooks import HookRunner  # late: most containers have none

        return HookRunner(self.starter.children, self.starter.waits)

    def _runtime_hooks(self, spec: Spec, container_id: str, bundle: str) -> RuntimeHooks:
        """Return the hooks of a configuration while its container is created."""
        from caisson.agent.libcontainer.process.hooks import RuntimeHooks

        return RuntimeHooks(self.hooks, spec, container_id, bundle)

    async def pause(self, procfs: str, rootfs: str, join: Mapping[str, str]) -> Child:
        """Start the init of a new pid namespace, which only reaps; it ends by SIGKILL, or with its parent.

        The namespace's procfs is mounted on the directory `procfs`; `rootfs` is empty; `join` maps namespace
        types to paths to join.  Raises LaunchError.
        """
        target = os.open(procfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        ends = os.pipe2(os.O_CLOEXEC)  # for stdio, which it closes
        try:
            started = await self.starter.start(
                lambda: plan.pause_messages(rootfs, join),
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
    """Return the scheduler of a process in a joined pid namespace, if it would not survive the clone into it."""
    attributes = process.scheduler or (spec.process.scheduler if spec.process is not None else None)
    if attributes is None or not ("pid" in join or any(one.type == "pid" for one in spec.linux.namespaces)):
        return None
    from caisson.agent.libcontainer.config.scheduling import is_lost_by_clone

    return attributes if is_lost_by_clone(attributes) else None


def _rdt_group(spec: Spec, container_id: str) -> ResctrlGroup | None:
    """Return the container's resctrl group, if it has one.  Raises LaunchError."""
    if spec.linux.intel_rdt is None:
        return None
    from caisson.agent.libcontainer.intel_rdt import ResctrlGroup  # late: rarely used

    return ResctrlGroup(spec.linux.intel_rdt, container_id)


def _also_in(launch: Launch, group: ResctrlGroup | None) -> Launch:
    """Return the launch with its process joining a resctrl group before it runs."""
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
    """Return the destination of the filter's listener, if it has one."""
    if spec.linux.seccomp is None or not spec.linux.seccomp.listener_path:
        return None
    from caisson.agent.libcontainer.process.listener import Listener  # late: most containers have none

    return Listener(spec, container_id, bundle, init_pid)


def _encode(messages: Callable[..., bytes], *arguments: Any, **options: Any) -> bytes:
    try:
        return messages(*arguments, **options)
    except EncodingError as error:
        raise LaunchError(str(error), step="encode") from error

"""Starting processes in containers: create, start and exec, by way of nsexec."""

from __future__ import annotations

import asyncio
import os
from contextlib import nullcontext

from caisson.agent.base.record import Record
from caisson.agent.libcontainer.config.spec import Hooks
from caisson.agent.libcontainer.errors import LaunchError, reason
from caisson.agent.libcontainer.plan import plan, users
from caisson.agent.libcontainer.plan.wire import EncodingError
from caisson.agent.libcontainer.process.channel import kill
from caisson.agent.libcontainer.process.init_process import CLEANUP_SECONDS, Child, Children, InitProcess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from caisson.agent.libcontainer.cgroups import Cgroup
    from caisson.agent.libcontainer.config.seccomp import Seccomp
    from caisson.agent.libcontainer.config.spec import Hook, Process, Spec
    from caisson.agent.libcontainer.process.hooks import CreateHooks
    from caisson.agent.libcontainer.process.nsexec import Nsexec
    from caisson.agent.libcontainer.process.seccomp_bpf import Filters

__all__ = ["Child", "Children", "LaunchError", "Launched", "ProcessLauncher", "Stdio"]

FIFO_MODE = 0o622  # an init that has become another user must be able to open it for writing
LOG_INFO, LOG_DEBUG = "4", "5"  # logrus's, which nsexec is told in


class Stdio(Record):
    """File descriptors for the child's 0, 1 and 2; the caller closes them afterwards."""

    stdin: int
    stdout: int
    stderr: int


class Launched(Record):
    """A started process.  `console` is the master of its terminal (the caller owns it), iff it has one."""

    child: Child
    console: int | None


class ProcessLauncher:
    """Makes processes in containers.  `log(level, message, container=…)` gets nsexec's own lines, without
    `verbose` none of the level debug.

    `timeout` (seconds) bounds how long nsexec may take before it is killed.
    """

    def __init__(
        self,
        nsexec: Nsexec,
        children: Children,
        log: Callable[..., None],
        *,
        timeout: float = 30.0,
        verbose: bool = True,
    ) -> None:
        self._nsexec = nsexec
        self._children = children
        self._log = log
        self._patience = timeout
        self._verbose = verbose
        self._inits: dict[Child, InitProcess] = {}
        self._filters: Filters | None = None
        self._watchers: set[asyncio.Task[None]] = set()

    async def create(
        self,
        spec: Spec,
        *,
        container_id: str,
        bundle: Path,
        rootfs: str,
        join: Mapping[str, str],
        cgroup: Cgroup | None,
        stdio: Stdio | None,
        fifo: Path,
        procfs: str | None = None,
    ) -> Launched:
        """Set up a container's first process up to where it waits on `fifo` (made here) to be started.

        `stdio` is None iff the process has a terminal; `join` maps namespace types to paths to join; it is in `cgroup`
        from its first instruction on; `procfs` is a mount of the pid namespace's procfs, if one is joined.  Hooks run
        as the configuration wants them.  On failure nothing is left.  Raises SpecError, or LaunchError.
        """
        process = spec.process
        if process is not None and process.user.username:
            spec = spec.but(process=users.resolved(process, rootfs))
        filter = b"" if spec.linux.seccomp is None else await self._filter(spec.linux.seccomp)
        hooks = None if spec.hooks == Hooks() else self._create_hooks(spec, container_id, bundle)
        messages = _encode(
            lambda: plan.init_messages(
                spec,
                rootfs=rootfs,
                bundle=bundle,
                join=join,
                cgroups={} if cgroup is None else cgroup.paths,
                procfs=procfs,
                hook_state="" if hooks is None else hooks.state,
                filter=filter,
            )
        )
        terminal = process is not None and process.terminal
        _check_stdio(terminal, stdio)
        try:
            _make_fifo(fifo)
            fifo_fd = os.open(fifo, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as e:
            raise LaunchError(
                f"exec fifo {fifo}: {reason(e.errno or 0)}", step="exec fifo", path=str(fifo), errno=e.errno or 0
            ) from e
        try:
            # Where others may look at it while it waits, it is not given anything that is the runtime's.
            starts_by_socket = "pid" in plan.joined_paths(spec.linux, join)
            launch = await self._launch(
                messages,
                "standard",
                stdio,
                {} if starts_by_socket else {"_LIBCONTAINER_FIFOFD": fifo_fd},
                cgroup=cgroup,
                container_id=container_id,
                terminal=terminal,
                until_exec=False,
                hooks=hooks,
            )
        except BaseException:
            fifo.unlink(missing_ok=True)
            raise
        finally:
            os.close(fifo_fd)
        child = launch.child
        assert child is not None
        launch.joined, launch.starts_by_socket, launch.filter = dict(join), starts_by_socket, filter
        launch.start_seconds = self._patience if hooks is None else _more(self._patience, hooks.start_seconds)
        self._inits[child] = launch
        self._watch(child)
        return Launched(child, launch.channel.take_console())

    async def start(self, fifo: Path, init: Child) -> None:
        """Let a created init go on to its program, and return once it has.

        Raises LaunchError if it is gone, was started before, or its program could not be executed.
        """
        launch = self._inits.get(init)
        if launch is None:
            raise LaunchError("the container's init is gone", step="start")
        await (self._tell(fifo, launch) if launch.starts_by_socket else self._open(fifo, launch))
        try:
            await _first([launch.channel.ended], launch.start_seconds)
        except LaunchError:
            kill(launch.channel.pidfd)
            raise
        if launch.channel.error is not None:
            raise launch.channel.error

    async def _tell(self, fifo: Path, launch: InitProcess) -> None:
        """Let an init go on that has no fifo to wait on; the file stands for it."""
        if not fifo.exists():
            raise LaunchError("the container was started before", step="start", path=str(fifo))
        channel = launch.channel
        channel.release_init()
        await asyncio.wait(
            [channel.running, channel.ended], timeout=self._patience, return_when=asyncio.FIRST_COMPLETED
        )
        if not channel.running.done():
            raise channel.error or LaunchError("the container's init died before it was started", step="start")
        fifo.unlink(missing_ok=True)

    async def _open(self, fifo: Path, launch: InitProcess) -> None:
        """Open the fifo on which an init waits to be started, and take it away."""
        loop = asyncio.get_running_loop()
        try:
            fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            message = "the container was started before"
            raise LaunchError(message, step="start", path=str(fifo), errno=e.errno or 0) from e
        opened: asyncio.Future[None] = loop.create_future()
        loop.add_reader(fd, _settle, opened)
        try:
            await asyncio.wait([opened, launch.channel.ended], return_when=asyncio.FIRST_COMPLETED)
            if not opened.done() or not os.read(fd, 1):
                raise launch.channel.error or LaunchError(
                    "the container's init died before it was started", step="start"
                )
            fifo.unlink(missing_ok=True)
        finally:
            loop.remove_reader(fd)
            os.close(fd)

    async def exec(
        self, process: Process, *, spec: Spec, init: Child, cgroup: Cgroup | None, stdio: Stdio | None
    ) -> Launched:
        """Run another process in all namespaces of a container; returns when execve has happened.

        What the process does not say (capabilities, limits, no_new_privs) is as for the container's own.  Raises
        SpecError, or LaunchError.
        """
        launch = self._inits.get(init)
        if launch is None:
            raise LaunchError("the container is not running", step="exec")
        _check_stdio(process.terminal, stdio)
        if process.user.username:  # its root as it is now; nobody else can have the pid while it is not reaped
            process = users.resolved(process, f"/proc/{init.pid}/root")
        messages = _encode(lambda: plan.exec_messages(process, spec, launch.joined, launch.filter))
        started = await self._launch(
            messages,
            "setns",
            stdio,
            {"_CAISSON_PIDFD": launch.channel.pidfd},
            cgroup=cgroup,
            container_id=launch.container_id,
            terminal=process.terminal,
            until_exec=True,
        )
        child = started.child
        assert child is not None
        console = started.channel.take_console()
        started.close()
        return Launched(child, console)

    async def pause(self, procfs: str, rootfs: str, join: Mapping[str, str]) -> Child:
        """Start the first process of a new pid namespace, which only reaps; it ends by SIGKILL, or with the agent.

        The namespace's procfs is mounted on the directory `procfs`; `rootfs` is an empty one; `join` maps namespace
        types to paths to join.  Raises LaunchError.
        """
        target = os.open(procfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        ends = os.pipe2(os.O_CLOEXEC)  # for stdio, which it closes
        try:
            launch = await self._launch(
                plan.pause_messages(rootfs, join),
                "pause",
                Stdio(ends[0], ends[1], ends[1]),
                {"_CAISSON_PROCFS": target},
                cgroup=None,
                container_id="pause",
                terminal=False,
                until_exec=True,
            )
        finally:
            for fd in (target, *ends):
                os.close(fd)
        launch.close()
        assert launch.child is not None
        return launch.child

    async def close(self) -> None:
        """Let go of all containers; their processes are not touched."""
        watchers = list(self._watchers)
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)  # nothing of it runs in the loop any more
        for launch in self._inits.values():
            launch.close()
        self._inits.clear()

    async def _launch(
        self,
        messages: bytes,
        kind: str,
        stdio: Stdio | None,
        child_fds: Mapping[str, int],
        *,
        cgroup: Cgroup | None,
        container_id: str,
        terminal: bool,
        until_exec: bool,
        hooks: CreateHooks | None = None,
    ) -> InitProcess:
        """Spawn nsexec and follow it until it is ready (and has executed its program).  Nothing is left on failure."""
        entered: AbstractContextManager[dict[str, int]] = nullcontext({}) if cgroup is None else cgroup.join_fds()
        with self._children.expecting(), entered as ways:
            launch = InitProcess(self._children, self._log, container_id, terminal=terminal)
            channel = launch.channel
            try:
                fds = {**channel.child_fds, **child_fds, **ways}
                env = {name: str(fd) for name, fd in fds.items()}
                env |= {
                    "_LIBCONTAINER_INITTYPE": kind,
                    "_LIBCONTAINER_LOGLEVEL": LOG_DEBUG if self._verbose else LOG_INFO,
                }
                channel.send(messages)
                ends = None if stdio is None else (stdio.stdin, stdio.stdout, stdio.stderr)
                try:
                    launch.spawned(self._nsexec.spawn(ends, fds.values(), env))
                except OSError as e:
                    raise LaunchError(f"spawn nsexec: {reason(e.errno or 0)}", step="spawn", errno=e.errno or 0) from e
                timeout: float | None = self._patience
                if hooks is not None:
                    if hooks.outside:
                        await _first([channel.at_hooks, channel.ended], timeout)
                    if channel.at_hooks.done():
                        await hooks.run((launch.child or launch.stages[-1]).pid)
                        channel.release_init()
                    timeout = _more(self._patience, hooks.create_seconds)
                await _first([channel.ended] if until_exec else [channel.ready, channel.ended], timeout)
                if channel.error is not None:
                    raise channel.error
                if not channel.ready.done() or launch.child is None or channel.pidfd < 0:
                    raise LaunchError(await self._obituary(launch), step="nsexec")
                if terminal and channel.console < 0:
                    raise LaunchError("console: no terminal came", step="console")
            except BaseException:
                await launch.destroy()
                raise
        channel.close_setup()
        launch.close_stage0()
        return launch

    async def _filter(self, profile: Seccomp) -> bytes:
        from caisson.agent.libcontainer.process.seccomp_bpf import Filters

        if self._filters is None:
            self._filters = Filters()
        return await self._filters.program(profile)

    def _create_hooks(self, spec: Spec, container_id: str, bundle: Path) -> CreateHooks:
        from caisson.agent.libcontainer.process.hooks import CreateHooks

        return CreateHooks(self._children, spec, container_id, str(bundle))

    async def run_hooks(self, point: str, hooks: Iterable[Hook], document: str) -> None:
        """Run hooks that belong to the agent.  Raises LaunchError at the first that fails."""
        from caisson.agent.libcontainer.process import hooks as module

        await module.run(self._children, point, hooks, document)

    async def _obituary(self, launch: InitProcess) -> str:
        """What happened to an nsexec that ended without a word."""
        last = launch.child or (launch.stages[-1] if launch.stages else None)
        if last is None:
            return "nsexec could not be started"
        try:
            status = await asyncio.wait_for(last.wait(), CLEANUP_SECONDS)
        except TimeoutError:
            return "nsexec broke off"
        return f"nsexec was killed by signal {status - 128}" if status > 128 else f"nsexec ended with status {status}"

    def _watch(self, child: Child) -> None:
        """Let go of an init's descriptors at its end."""

        async def watch() -> None:
            await child.wait()
            launch = self._inits.pop(child, None)
            if launch is not None:
                # A start in progress still wants to hear of the end.
                await asyncio.wait([launch.channel.ended], timeout=CLEANUP_SECONDS)
                launch.close()

        task = asyncio.get_running_loop().create_task(watch())
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)


async def _first(futures: Iterable[asyncio.Future[None]], seconds: float | None) -> None:
    """Wait for one of them.  Raises LaunchError when none comes."""
    done, _ = await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    if not done:
        raise LaunchError(f"nsexec took longer than {seconds:g} s and was killed", step="nsexec")


def _more(seconds: float, hooks: float | None) -> float | None:
    """A time with that of hooks added, of which None is any time."""
    return None if hooks is None else seconds + hooks


def _encode(make: Callable[[], bytes]) -> bytes:
    try:
        return make()
    except EncodingError as e:
        raise LaunchError(str(e), step="encode") from e


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _make_fifo(fifo: Path) -> None:
    os.mkfifo(fifo, FIFO_MODE)
    try:
        fifo.chmod(FIFO_MODE)  # whatever the agent's umask is
    except OSError:
        fifo.unlink()
        raise


def _check_stdio(terminal: bool, stdio: Stdio | None) -> None:
    if terminal != (stdio is None):
        raise LaunchError("stdio is given iff there is no terminal", step="stdio")

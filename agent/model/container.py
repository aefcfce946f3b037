"""A container: an init process in its own namespaces, further processes, and their limits.

created → running → stopped, and paused in between; each change of state under the container's own lock, never a wider
one.
"""

from __future__ import annotations

import asyncio
import os
import signal
from errno import EBUSY
from functools import partial

from caisson.agent.base.aio import runs_to_completion
from caisson.agent.base.errors import (
    CannotExec,
    CannotPause,
    NotCreated,
    NotPaused,
    NotRunning,
    Unsupported,
)
from caisson.agent.libcontainer.cgroups.base import CgroupError, signal_pids
from caisson.agent.libcontainer.config.resources import Resources
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.process import gate
from caisson.agent.libcontainer.process.launch import Launch
from caisson.agent.libcontainer.state import CREATED, PAUSED, RUNNING, STOPPED, ProcessStat, State, check_id, now
from caisson.agent.libcontainer.waits import Deadline
from caisson.agent.model.oom import OomWatcher
from caisson.agent.model.pipes import Pipes
from caisson.agent.model.process import Process, kernel_drops, start_process
from caisson.agent.model.process_table import ProcessTable
from caisson.agent.model.waits import Readers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from pathlib import Path
    from typing import TypeVar

    from caisson.agent.base.log import Log
    from caisson.agent.libcontainer.cgroups import Cgroup
    from caisson.agent.libcontainer.cgroups.base import JoinFds
    from caisson.agent.libcontainer.cgroups.stats import CgroupStats
    from caisson.agent.libcontainer.config.process import Process as ProcessSpec
    from caisson.agent.libcontainer.config.spec import Hook, Spec
    from caisson.agent.libcontainer.process.launch import Launched, Stdio
    from caisson.agent.libcontainer.process.launcher import ProcessLauncher
    from caisson.agent.model.bulk import Bulk

    T = TypeVar("T")

#: Seconds to wait for killed processes to exit before their cgroup is removed.
EMPTY_TIMEOUT = 8.0


class Container:
    """One container of the sandbox."""

    def __init__(
        self,
        container_id: str,
        spec: Spec,
        *,
        launcher: ProcessLauncher,
        cgroup: Cgroup | None,
        directory: Path,
        pipe_size: int,
        bulk: Bulk,
        log: Log,
        oom: Callable[[], object],
    ) -> None:
        """``oom`` is called when the OOM killer has killed one of its processes."""
        self.id = container_id
        self._oom = oom
        self.spec = spec
        self._launcher = launcher
        self._cgroup = cgroup
        self._directory = directory
        self._gate = str(directory / "exec.fifo")
        self._pipe_size, self._bulk = pipe_size, bulk
        self._log = log
        self._resources = spec.linux.resources or Resources()
        self._lock = asyncio.Lock()
        self._processes = ProcessTable(container_id, log)
        #: Reads its processes, cgroups and files.
        self.reads = Readers(container_id)
        self._pidfd = -1  # of its init
        self._join: dict[str, str] = {}  # namespaces that it joined beyond its configuration's
        self._procfs: str | None = None  # of the pid namespace that it joined
        self._filter = b""  # seccomp
        self._oom_watcher: OomWatcher | None = None
        self._paused = False
        self._shares_pids = False  # its other processes outlive init
        self._hooks_may_have_run = False  # so that its poststop hooks have to
        self._poststart: asyncio.Task[None] | None = None
        self._ending = False  # no process can start in it any more
        self._removed = False

    @property
    def _init(self) -> Process | None:
        return self._processes.init

    @property
    def status(self) -> str:
        """created, running, paused or stopped."""
        if self._init is None or self._init.child.status is not None:
            return STOPPED
        if self._paused:
            return PAUSED
        return CREATED if os.path.exists(self._gate) else RUNNING  # noqa: PTH110 - starting it removes the gate

    @property
    def joined(self) -> tuple[dict[str, str], str | None]:
        """The arguments it was created with: namespaces to join, and the procfs of the pid namespace."""
        return self._join, self._procfs

    async def create(self, exec_id: str, join: dict[str, str], procfs: str | None = None) -> None:
        """Set up the init process, up to the point before its program runs.  Nothing is left on failure.

        `join` and `procfs` are as for ProcessLauncher.create.
        """
        assert self.spec.process is not None and self.spec.root is not None
        check_id(exec_id)
        if self._cgroup is not None:
            self._cgroup.apply(self._resources)
            watch = self._cgroup.oom_watch(self._oom)
            self._oom_watcher = None if watch is None else OomWatcher(watch)
        root, bundle, launcher = self.spec.root.path, str(self._directory), self._launcher
        self._join, self._procfs = join, procfs
        self._filter = await launcher.filter(self.spec.linux.seccomp)

        def launch(stdio: Stdio | None, cgroup_fds: dict[str, int]) -> Awaitable[Launched]:
            return launcher.create(
                self.spec,
                Launch(self.id, stdio, cgroup_fds),
                bundle=bundle,
                rootfs=root,
                join=join,
                start_gate=self._gate,
                cgroups={} if self._cgroup is None else self._cgroup.paths,
                procfs=procfs,
                filter=self._filter,
            )

        self._hooks_may_have_run = True
        self._shares_pids = "pid" in join
        try:
            make_pipes = None if self.spec.process.terminal else self._make_pipes
            init, self._pidfd = await start_process(launch, exec_id, make_pipes, self._bulk, self._join_fds())
        except LaunchError as error:
            if self._cgroup is not None and self._cgroup.oom_kills():
                raise LaunchError("container init was OOM-killed (memory limit too low?)", step="oom") from error
            raise
        self._processes.add_init(init, self._init_exited)
        pid = init.child.pid
        found = ProcessStat.read(pid)
        state = State(
            id=self.id,
            init_process_pid=pid,
            init_process_start=0 if found is None else found.start_time,
            created=now(),
            cgroup_paths={} if self._cgroup is None else self._cgroup.by_controller,
            labels=self.spec.annotations,
            bundle=bundle,
            rootfs=root,
            joined=join,
        )
        state.save(bundle)

    @runs_to_completion
    async def start(self) -> None:
        """Let the program run.  Raises NotCreated, or LaunchError when its init died before.

        Runs to completion: an init interrupted half-way could not be started again.
        """
        async with self._lock:
            if self.status != CREATED:
                raise NotCreated(container_id=self.id, status=self.status)
            assert self._init is not None
            await self._launcher.start(self._gate, self._init.child.pid, self._pidfd, self.spec.hooks)
            if self.spec.hooks.poststart and not self._ending:
                hooks = self._run_hooks("poststart", self.spec.hooks.poststart, RUNNING, self._init.child.pid)
                self._poststart = asyncio.ensure_future(hooks)
        if self._poststart is not None:  # without the lock: they may take long, and removal may come meanwhile
            await asyncio.wait([self._poststart])

    async def _run_hooks(self, point: str, hooks: Iterable[Hook], status: str, pid: int = 0) -> None:
        """Run hooks whose failures are only logged (runtime.md, "Lifecycle", steps 9 and 13)."""
        from caisson.agent.libcontainer.process.hooks import state

        document = state(self.id, str(self._directory), self.spec.annotations, status, pid)
        for hook in hooks:
            try:
                await self._launcher.hooks.run(point, (hook,), document)
            except (LaunchError, OSError) as error:
                self._log("warning", "a hook failed", error=str(error))

    async def exec(self, exec_id: str, process: ProcessSpec) -> Process:
        """Run another process in it; returns once it is running.  Raises LaunchError when it cannot."""
        check_id(exec_id)
        if self._ending or self.status == STOPPED:
            raise CannotExec(container_id=self.id, status=STOPPED)
        if self._paused:  # a process started in it would freeze before it reports
            raise CannotExec(container_id=self.id, status=PAUSED)
        assert self._init is not None and self.spec.root is not None
        init = self._init.child
        # A container's mounts propagate here if it asks for that.
        rootfs = "" if "shared" in self.spec.linux.rootfs_propagation else self.spec.root.path

        def launch(stdio: Stdio | None, cgroup_fds: dict[str, int]) -> Awaitable[Launched]:
            return self._launcher.exec(
                process,
                Launch(self.id, stdio, cgroup_fds),
                spec=self.spec,
                init_pid=init.pid,
                pidfd=self._pidfd,
                join=self._join,
                filter=self._filter,
                bundle=str(self._directory),
                rootfs=rootfs,
            )

        async def start() -> tuple[Process, int]:
            make_pipes = None if process.terminal else self._make_pipes
            try:
                return await start_process(launch, exec_id, make_pipes, self._bulk, self._join_fds())
            except LaunchError as error:
                if error.errno != EBUSY or self._cgroup is None:
                    raise
                join = await self.reads(partial(self._cgroup.join_fds_of, init.pid))
            return await start_process(launch, exec_id, make_pipes, self._bulk, join)

        with self._processes.starting(exec_id):
            try:
                started, pidfd = await start()
            except LaunchError as error:
                if self._ending or init.status is not None:  # that is why it failed
                    raise CannotExec(container_id=self.id, status=STOPPED) from error
                raise
            os.close(pidfd)
            self._processes.add_exec(started)
            return started

    def _make_pipes(self) -> Pipes:
        return Pipes(self._pipe_size, self._resources.memory.limit, self._bulk)

    def _join_fds(self) -> JoinFds | None:
        return None if self._cgroup is None else self._cgroup.join_fds()

    @runs_to_completion  # else it could be left frozen, but not paused: nothing would thaw it
    async def pause(self) -> None:
        """Freeze all processes.  Raises CannotPause if they are already frozen, or it has exited."""
        async with self._lock:
            if self.status not in (CREATED, RUNNING):
                raise CannotPause(container_id=self.id, status=self.status)
            if self._cgroup is None:
                raise Unsupported("pausing a container needs a cgroup, and this machine has no cgroup hierarchy")
            await self._cgroup.freeze()
            self._paused = True

    @runs_to_completion
    async def resume(self) -> None:
        """Thaw all processes.  Raises NotPaused."""
        async with self._lock:
            if self.status != PAUSED or self._cgroup is None:
                raise NotPaused(container_id=self.id)
            await self._cgroup.thaw()
            self._paused = False

    async def stats(self) -> CgroupStats:
        """Read its usage so far.  Takes no lock and blocks nothing else: the files are read in a thread."""
        if self._cgroup is None:
            raise Unsupported("statistics of a container need a cgroup, and this machine has no cgroup hierarchy")
        return await self.reads(self._cgroup.stats)

    @runs_to_completion
    async def update(self, resources: Resources) -> None:
        """Change the limits given in `resources`, all or none.

        Raises NotRunning if it has exited, SpecError or CgroupError for a limit that cannot be set.
        """
        async with self._lock:
            if self.status == STOPPED:
                raise NotRunning(container_id=self.id)
            if self._cgroup is None:
                raise Unsupported("limits of a container need a cgroup, and this machine has no cgroup hierarchy")
            wanted = self._resources.updated(resources)
            await self._cgroup.update(wanted)
            self._resources = wanted

    def allow_hotplugged_cpus(self) -> None:
        """Let it use hot-plugged CPUs, unless it is restricted to certain ones.  A failure is logged."""
        if self._cgroup is None:
            return
        try:
            self._cgroup.allow_hotplugged_cpus(above_only=bool(self._resources.cpu.cpus))
        except CgroupError as error:
            self._log("warning", "a container could not be given the new CPUs", error=str(error))

    async def pids(self) -> list[int]:
        """List its processes, by their pids in the agent's namespace; without cgroups only those that the agent
        started.
        """
        return await self.inspect(sorted)

    async def inspect(self, reader: Callable[[Iterable[int]], T]) -> T:
        """Call a function with all its pids, in a thread that may inspect these processes.  Raises ReadTimeout."""
        cgroup = self._cgroup
        known = self._processes.running_pids()
        return await self.reads(lambda: reader(sorted(known if cgroup is None else cgroup.pids())))

    def process(self, exec_id: str) -> Process:
        """Return a process by its id; an empty id means init.  Raises ProcessNotFound."""
        return self._processes.find(exec_id)

    @runs_to_completion
    async def signal_all(self, number: int) -> None:
        """Signal every process in it, ignoring any that has just exited.  A paused container is resumed.

        Without a cgroup these are the processes that the agent started.
        """
        if self._cgroup is None:
            self._processes.signal(number)
            return
        if number == signal.SIGKILL:
            await self._cgroup.kill()
            return
        async with self._lock:
            if self._removed:
                return
            await self._cgroup.freeze()  # so that nothing can fork while the list is read
            try:
                signal_pids(await self.reads(self._cgroup.pids), number)
            finally:
                await self._cgroup.thaw()
                self._paused = False

    async def signal(self, exec_id: str, number: int) -> None:
        """Signal one process.  An init process for which the kernel would drop SIGTERM or SIGINT gets SIGKILL instead.

        The kernel drops signals that PID 1 of a namespace does not handle (pid_namespaces(7)), and stopping a container
        should not have to wait for a timeout.  A process that ignores them, or blocks them to wait for them, has chosen
        so. Raises ProcessExited.
        """
        process = self.process(exec_id)
        child = process.child
        stops = process is self._init and child.status is None and number in (signal.SIGTERM, signal.SIGINT)
        if stops and await self.reads(lambda: kernel_drops(child.pid, number)):
            number = signal.SIGKILL
        child.signal(number)

    async def remove(self) -> None:
        """Kill it in any state, and remove everything it leaves.  A concurrent remove waits, then finds nothing.

        Raises CgroupError or OSError; it can be retried then.
        """
        self._ending = True
        self._processes.signal(signal.SIGKILL)  # a start that waits for a hook ends, and releases the lock
        async with self._lock:
            if self._removed:
                return
            if self._poststart is not None:
                self._poststart.cancel()
                await asyncio.wait([self._poststart])
            if self._init is not None:
                await self._kill_all()
            await self._processes.release()
            if self._cgroup is not None:
                if self._shares_pids:
                    await self._wait_until_empty(self._cgroup)
                await self._cgroup.delete()
            self._close()
            gate.remove(self._gate)
            (self._directory / "state.json").unlink(missing_ok=True)
            if self._directory.is_dir():
                self._directory.rmdir()
            self._removed = True
            if self._hooks_may_have_run and self.spec.hooks.poststop:
                await self._run_hooks("poststop", self.spec.hooks.poststop, STOPPED)

    def _close(self) -> None:
        """Close everything held for its init process and its cgroup."""
        if self._oom_watcher is not None:
            self._oom_watcher.close()
            self._oom_watcher = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        self.reads.close()

    async def _kill_all(self) -> None:
        """Send SIGKILL to all its processes, including those being started; without a cgroup, to all that the agent
        knows.
        """
        if self._cgroup is not None:
            await self._cgroup.kill()
        await self._processes.kill()

    async def _wait_until_empty(self, cgroup: Cgroup) -> None:
        """Wait for killed processes that are no children of the agent; in its own pid namespace the kernel does
        that.
        """
        deadline, pause = Deadline(EMPTY_TIMEOUT), 0.001
        while await self.reads(cgroup.pids) and deadline.left:
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.05)

    async def _init_exited(self) -> None:
        """Kill what outlives init in a shared pid namespace; in its own the kernel does that."""
        if self._shares_pids and not self._ending:
            try:
                await self._kill_all()
            except CgroupError as error:  # removal tries again, and reports the error
                self._log("error", "the remaining processes of a container could not be killed", error=str(error))

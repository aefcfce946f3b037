"""A container as described by its state directory, its cgroup and /proc: no state is kept only in memory.

One process may create a container, another start it, a third exec into it, and any other pause, update, kill and delete
it; a process that is killed half-way leaves nothing that the next cannot remove.  Commands that change a container hold
a lock on its directory.
"""

from __future__ import annotations

import os

from caisson.agent.base.json import dumps
from caisson.agent.libcontainer import faults
from caisson.agent.libcontainer import state as files
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.errors import NO_PROCESS, LaunchError
from caisson.agent.libcontainer.state import CREATED, PAUSED, RUNNING, STOPPED, ProcessStat, State
from caisson.agent.libcontainer.state_directory import ContainerError, DoesNotExist, remove_directory
from caisson.agent.libcontainer.waits import wait_until
from caisson.proto.record import NOTHING, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterable, Mapping

    from caisson.agent.libcontainer.cgroups import Cgroup, Hierarchy
    from caisson.agent.libcontainer.config.process import Process
    from caisson.agent.libcontainer.config.spec import Hook, Spec
    from caisson.agent.libcontainer.process.launch import Launch, Launched
    from caisson.agent.libcontainer.process.launcher import ProcessLauncher
    from caisson.agent.libcontainer.waits import Waits
else:
    import _signal as signal

CONFIG, FILTER, GATE = "config.json", "seccomp", "exec.fifo"
SIGKILL = 9
KILL_TIMEOUT = 10.0  # seconds for killed processes to disappear
DIRECTORY_MODE = 0o711


def ignore(container: Container) -> None:
    """Do nothing with a container."""


class Runtime(Record):
    """The environment for running containers: state directory, process launcher, waits and cgroups.

    `saved` is called after the state of a container with a process was written.
    """

    root: str
    waits: Waits
    launcher: Callable[[], ProcessLauncher]
    hierarchy: Callable[[], Hierarchy | None]
    warn: Callable[[str], object]
    saved: Callable[[Container], object] = ignore


class Container:
    """One container.  Its methods that wait are coroutines over the runtime's waits (waits.py)."""

    def __init__(self, runtime: Runtime, directory: str, state: State, spec: Spec | None = None) -> None:
        self.runtime = runtime
        self.directory = directory
        self.state = state
        self._spec = spec
        self._cgroup: Cgroup | None = None

    @classmethod
    def load(cls, runtime: Runtime, container_id: str) -> Container:
        """Find a container by its id.  Raises DoesNotExist, or SpecError for a state that cannot be read."""
        directory = f"{runtime.root}/{files.check_id(container_id)}"
        try:
            state = State.load(directory)
        except FileNotFoundError:
            raise DoesNotExist from None
        if state.init_process_pid < 0:
            raise DoesNotExist
        return cls(runtime, directory, state)

    @property
    def id(self) -> str:
        """The container's id."""
        return self.state.id

    @property
    def spec(self) -> Spec:
        """The configuration it was created with.  Raises SpecError."""
        if self._spec is None:
            from caisson.agent.libcontainer.config.spec import Spec  # late: many commands only read the state

            self._spec = Spec.from_json(files.read_json(f"{self.directory}/{CONFIG}"))
        return self._spec

    @property
    def gate(self) -> str:
        """The start gate: the file at which it waits (process/gate.py)."""
        return f"{self.directory}/{GATE}"

    @property
    def cgroup(self) -> Cgroup | None:
        """The cgroup; None without cgroups."""
        if self._cgroup is None and self.state.cgroup_paths:
            hierarchy = self.runtime.hierarchy()
            if self.state.systemd and hierarchy is not None:
                from caisson.agent.libcontainer.cgroups.systemd import Systemd

                hierarchy = Systemd(hierarchy)
            self._cgroup = None if hierarchy is None else hierarchy.open(self.state.cgroup_paths)
        return self._cgroup

    def stat(self) -> ProcessStat | None:
        """Read its init process if it is alive, and not another process that has reused the pid."""
        found = ProcessStat.read(self.state.init_process_pid) if self.state.init_process_pid > 0 else None
        if found is None or not found.alive or found.start_time != self.state.init_process_start:
            return None
        return found

    @property
    def status(self) -> str:
        """created, running, paused or stopped."""
        found = self.stat()
        if found is None:
            return STOPPED
        if self._is_frozen():
            return PAUSED
        return RUNNING if found.executed else CREATED

    def _is_frozen(self) -> bool:
        """Return whether its cgroup is frozen, without importing cgroup code, for commands that only read."""
        for controller, name, words in (("freezer", "freezer.state", "FROZEN"), ("", "cgroup.events", "frozen 1")):
            path = self.state.cgroup_paths.get(controller)
            if path is None:
                continue
            try:
                with open(f"{path}/{name}", encoding="utf-8") as file:  # noqa: PTH123 - no pathlib at start
                    return words in file.read().splitlines()
            except OSError:
                return False
        return False

    def pidfd(self) -> int:
        """Open a pidfd of its init process.  Raises ContainerError if it has exited, and OSError."""
        try:
            pidfd = os.pidfd_open(self.state.init_process_pid)
        except OSError as error:
            if error.errno not in NO_PROCESS:
                raise
            raise ContainerError("container not running") from None
        if self.stat() is None:  # checked after opening: the pid had not been reused by then
            os.close(pidfd)
            raise ContainerError("container not running")
        return pidfd

    # --- create and start ---

    @staticmethod
    def reserve(directory: str, container_id: str, cgroup_paths: Mapping[str, str], *, systemd: bool = False) -> None:
        """Record which cgroup is about to be created for a container, so that a killed create can be cleaned up."""
        paths = {controller: path for name, path in cgroup_paths.items() for controller in name.split(",")}
        State(container_id, -1, 0, "", paths, systemd=systemd).save(directory)

    @classmethod
    async def create(
        cls,
        runtime: Runtime,
        container_id: str,
        spec: Spec,
        launch: Launch,
        *,
        document: Mapping[str, object],
        bundle: str,
        rootfs: str,
        cgroup: Cgroup | None,
        join: Mapping[str, str] = NOTHING,
        procfs: str | None = None,
        rootless: bool = False,
        systemd: bool = False,
    ) -> tuple[Container, Launched]:
        """Create a container in its directory, which exists and is empty, up to the point where its program waits to be
        started.

        `document` is the configuration that `spec` was read from.  On failure only the directory and the cgroup are
        left, for the caller to remove.  Raises SpecError, CgroupError or LaunchError.
        """
        directory = f"{runtime.root}/{container_id}"
        linux = document.get("linux")
        limits = linux.get("resources") if isinstance(linux, dict) else None
        state = State(
            id=container_id,
            init_process_pid=-1,
            init_process_start=0,
            created=files.now(),
            cgroup_paths={} if cgroup is None else cgroup.by_controller,
            labels=spec.annotations,
            bundle=bundle,
            rootfs=rootfs,
            joined=join,
            resources=limits if isinstance(limits, dict) else {},
            rootless=rootless,
            systemd=systemd,
        )
        container = cls(runtime, directory, state, spec)
        container._cgroup = cgroup
        files.write_whole(f"{directory}/{CONFIG}", dumps(document))
        state.save(directory)
        faults.reach("create_saved")
        launcher = runtime.launcher()
        filter = await launcher.filter(spec.linux.seccomp)
        if filter:
            with open(f"{directory}/{FILTER}", "wb") as file:  # noqa: PTH123 - no pathlib at start
                file.write(filter)
        launched = await launcher.create(
            spec,
            launch.but(announced=lambda pid: container._save_pid(pid, launch.announced)),
            bundle=bundle,
            rootfs=rootfs,
            join=join,
            start_gate=container.gate,
            cgroups={} if cgroup is None else cgroup.paths,
            procfs=procfs,
            filter=filter,
        )
        return container, launched

    def _save_pid(self, pid: int, also: Callable[[int], object] | None) -> None:
        """Save the pid while nsexec continues: whoever removes this container must find it."""
        found = ProcessStat.read(pid)
        self.state = self.state.but(init_process_pid=pid, init_process_start=0 if found is None else found.start_time)
        self._save()
        faults.reach("create_announced")
        if also is not None:
            also(pid)

    def _save(self) -> None:
        self.state.save(self.directory)
        self.runtime.saved(self)

    async def start(self) -> None:
        """Execute its program.  Raises ContainerError or LaunchError."""
        status = self.status
        if status == STOPPED:
            raise ContainerError("cannot start a container that has stopped")
        if status == PAUSED:
            raise ContainerError("cannot start a container in the paused state")
        if status != CREATED:
            raise ContainerError("cannot start an already running container")
        pidfd = self.pidfd()
        try:
            await self.runtime.launcher().start(self.gate, self.state.init_process_pid, pidfd, self.spec.hooks)
        finally:
            os.close(pidfd)
        try:
            await self.run_hooks("poststart", self.spec.hooks.poststart, RUNNING)
        except LaunchError:
            try:
                await self.kill(SIGKILL)
            except ContainerError:  # it has exited
                pass
            raise

    async def run_hooks(self, point: str, hooks: Iterable[Hook], status: str) -> None:
        """Run hooks in the runtime's namespaces.  Raises LaunchError at the first that fails."""
        if not hooks:
            return
        from caisson.agent.libcontainer.process.hooks import state

        pid = self.state.init_process_pid if status != STOPPED else 0
        document = state(self.id, self.state.bundle, self.state.labels, status, pid)
        await self.runtime.launcher().hooks.run(point, hooks, document)

    async def exec(self, process: Process, launch: Launch) -> Launched:
        """Run another process in it.  Raises ContainerError, SpecError or LaunchError."""
        pidfd = self.pidfd()
        try:
            return await self.runtime.launcher().exec(
                process,
                launch,
                spec=self.spec,
                init_pid=self.state.init_process_pid,
                pidfd=pidfd,
                join=self.state.joined,
                filter=self.filter(),
                bundle=self.state.bundle,
            )
        finally:
            os.close(pidfd)

    def filter(self) -> bytes:
        """Read the flags and the compiled program of its seccomp filter; empty without one."""
        try:
            with open(f"{self.directory}/{FILTER}", "rb") as file:  # noqa: PTH123 - no pathlib at start
                return file.read()
        except FileNotFoundError:
            return b""

    # --- signals and limits ---

    @property
    def has_own_pids(self) -> bool:
        """Whether it has its own pid namespace, so that all its processes end with init."""
        return "pid" not in self.state.joined and self.spec.linux.has_new_pids

    async def kill(self, number: int, *, every: bool = False) -> None:
        """Signal its init process, or all processes.  A paused container that is killed is thawed, so that it dies.

        Raises ContainerError, ProcessLookupError or OSError.
        """
        cgroup = self.cgroup
        if cgroup is not None and (every or (number == SIGKILL and not self.has_own_pids)):
            await self._signal_all(cgroup, number)
            return
        pidfd = self.pidfd()
        faults.reach("kill_signal")
        try:
            signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)
        faults.reach("kill_signalled")
        if number == SIGKILL and cgroup is not None and cgroup.frozen:
            await cgroup.thaw()

    async def _signal_all(self, cgroup: Cgroup, number: int) -> None:
        from caisson.agent.libcontainer.cgroups.base import signal_pids

        if number == SIGKILL:
            await cgroup.kill()
            return
        frozen = cgroup.frozen
        if not frozen and cgroup.exists:
            await cgroup.freeze()  # so that nothing can fork while the list is read
        faults.reach("kill_frozen")
        try:
            signal_pids(cgroup.pids(), number)
        finally:
            if not frozen and cgroup.exists:
                await cgroup.thaw()

    async def pause(self) -> None:
        """Freeze all processes.  Raises ContainerError or CgroupError."""
        if self.status not in (RUNNING, CREATED):
            raise ContainerError("container not running")
        faults.reach("pause_freeze")
        await self._require_cgroup().freeze()
        faults.reach("pause_frozen")

    async def resume(self) -> None:
        """Thaw all processes.  Raises ContainerError or CgroupError."""
        if self.status != PAUSED:
            raise ContainerError("container not paused")
        faults.reach("resume_thaw")
        await self._require_cgroup().thaw()
        faults.reach("resume_thawed")

    async def update(self, changes: Mapping[str, object]) -> None:
        """Change the limits given in `changes` (as linux.resources), all or none, and save them in the state.

        Raises ContainerError, SpecError or CgroupError.
        """
        if self.status == STOPPED:
            raise ContainerError("container not running")
        from caisson.agent.libcontainer.config.resources import Resources, merge

        cgroup = self._require_cgroup()
        old = Resources.from_json(self.state.resources)
        changed = Resources.from_json(changes)
        cgroup.known_devices(old.devices)
        faults.reach("update_limits")
        await cgroup.update(old.updated(changed.but(devices=())))
        faults.reach("update_applied")
        merged = merge(self.state.resources, {key: value for key, value in changes.items() if key != "devices"})
        self.state = self.state.but(resources=merged)
        self._save()

    def _require_cgroup(self) -> Cgroup:
        if self.cgroup is None:
            raise ContainerError("container has no cgroup")
        return self.cgroup

    def pids(self) -> list[int]:
        """List its processes, by their pids in this namespace; without a cgroup only the init process."""
        if self.cgroup is not None:
            return sorted(self.cgroup.pids())
        return [] if self.stat() is None else [self.state.init_process_pid]

    # --- the end ---

    async def delete(self, *, force: bool = False) -> None:
        """Remove a container that has exited or was never started; with `force` kill it first.

        Raises ContainerError or CgroupError; it can be retried then.
        """
        status = self.status
        if status not in (STOPPED, CREATED) and not force:
            raise ContainerError(f"cannot delete container {self.id} that is not stopped: {status}")
        await self.destroy()
        faults.reach("delete_directory")
        try:
            hooks, rdt = self.spec.hooks.poststop, self.spec.linux.intel_rdt
        except (OSError, SpecError):  # an interrupted create
            hooks, rdt = (), None
        if rdt is not None:
            from caisson.agent.libcontainer.intel_rdt import ResctrlGroup

            ResctrlGroup(rdt, self.id).remove()
        for hook in hooks:
            try:
                await self.run_hooks("poststop", (hook,), STOPPED)
            except LaunchError as error:
                self.runtime.warn(str(error))
        remove_directory(self.directory)

    async def destroy(self) -> None:
        """Kill its processes and remove its cgroup.  Raises ContainerError or CgroupError."""
        cgroup = self.cgroup
        if not self.state.created:  # it was only reserved: processes in a cgroup of that name are not its own
            if cgroup is not None:
                from caisson.agent.libcontainer.cgroups.files import remove_empty

                remove_empty(self.state.cgroup_paths.values())
            return
        try:
            pidfd = self.pidfd()
        except ContainerError:
            pidfd = -1
        if pidfd >= 0:
            try:
                try:
                    signal.pidfd_send_signal(pidfd, SIGKILL)
                except ProcessLookupError:
                    pass
                faults.reach("delete_killed")
                if cgroup is not None and cgroup.exists:
                    await cgroup.kill()
                if not await self.runtime.waits.readable(pidfd, seconds=KILL_TIMEOUT):
                    raise ContainerError(f"container {self.id} could not be killed")
            finally:
                os.close(pidfd)
        faults.reach("delete_cgroup")
        if cgroup is not None:
            if cgroup.exists and cgroup.pids():
                await cgroup.kill()
                await wait_until(lambda: not cgroup.pids(), KILL_TIMEOUT, self.runtime.waits)
            await cgroup.delete()

"""The sandbox: what all containers of this guest share, and the containers themselves."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from caisson.agent.base.aio import run_to_completion, runs_to_completion
from caisson.agent.base.errors import (
    AlreadyExists,
    ContainerExists,
    ContainerNotFound,
    FailedPrecondition,
    InvalidArgument,
    NotCreated,
    NotStopped,
    RemovalTimeout,
    SandboxExists,
    SandboxNotRunning,
)
from caisson.agent.guest import modules
from caisson.agent.guest.blockdevices import BlockDevices
from caisson.agent.guest.dns import Resolver
from caisson.agent.guest.storage import Storages
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.state import CREATED, STOPPED, check_id
from caisson.agent.model.bulk import Bulk
from caisson.agent.model.container import Container
from caisson.agent.model.guest_spec import adapt_to_guest, guest_hooks, may_make_networks
from caisson.agent.model.namespaces import SHARED, SharedNamespaces
from caisson.agent.model.oom import OomEvents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from caisson.agent.base.log import Log
    from caisson.agent.guest.devices import GuestDevice
    from caisson.agent.guest.hooks import GuestHooks
    from caisson.agent.guest.storage import Storage
    from caisson.agent.libcontainer.cgroups import Cgroup, Hierarchy
    from caisson.agent.libcontainer.config.resources import Resources
    from caisson.agent.libcontainer.config.spec import Spec
    from caisson.agent.libcontainer.process.launcher import ProcessLauncher

#: A sandbox's name if the host gives none.
UNNAMED = "sandbox"


class Sandbox:
    """The guest's only sandbox.  It runs between ``start`` and ``destroy``, and can be restarted."""

    def __init__(
        self,
        launcher: ProcessLauncher,
        cgroups: Hierarchy | None,
        state: Path,
        log: Log,
        *,
        open_files: tuple[int, int],
        pipe_size: int = 0,
        hotplug_timeout: float = 3.0,
    ) -> None:
        """``open_files`` is RLIMIT_NOFILE, soft and hard, for containers whose spec does not set it;
        ``hotplug_timeout`` is how many seconds to wait for a hot-plugged device.
        """
        self._launcher = launcher
        self._cgroups = cgroups
        self._state = state
        self._log = log
        self._open_files = open_files
        self._pipe_size, self._bulk = pipe_size, Bulk()
        self._lock = asyncio.Lock()
        self._unregistering = asyncio.Lock()
        self._id: str | None = None
        self._shared: SharedNamespaces | None = None
        self._hooks: GuestHooks | None = None
        self._containers: dict[str, Container] = {}
        self._creating: dict[str, asyncio.Event] = {}  # set when it is decided whether there is a container
        self._ending = False
        self._resolver = Resolver()
        self._blocks = BlockDevices(hotplug_timeout)
        self._storages = Storages(self._blocks, log, hotplug_timeout)
        self._mounts: dict[str, list[str]] = {}  # by container; "" for the sandbox's own
        self.oom_events = OomEvents()

    @property
    def shares_pids(self) -> bool:
        """Whether its containers share a pid namespace."""
        return self._shared is not None and self._shared.procfs is not None

    @property
    def running(self) -> bool:
        return self._id is not None and not self._ending

    async def start(
        self,
        sandbox_id: str,
        hostname: str,
        *,
        hook_path: str = "",
        shared_pids: bool = False,
        dns: Sequence[str] = (),
        storages: Sequence[Storage] = (),
    ) -> None:
        """Start it; `hook_path` is the directory of the guest's own hooks (guest/hooks.py), with `shared_pids` its
        containers see each other's processes, `dns` are the lines of the guest's resolv.conf, `storages` are mounted.

        Raises AlreadyExists, InvalidArgument, SystemCallFailed or Timeout; a failure leaves nothing behind.
        """
        async with self._lock:
            if self._id is not None:
                raise SandboxExists
            name = check_id(sandbox_id or UNNAMED)
            hooks = guest_hooks(hook_path) if hook_path else None
            directory = self._state / name
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            shared = SharedNamespaces(directory / ".namespaces")
            try:
                await shared.make(hostname, self._launcher if shared_pids else None)
            except (OSError, LaunchError) as error:
                self._forget_directory(directory)
                raise FailedPrecondition(f"failed to create namespace: {error}") from error
            try:
                self._mounts[""] = await self._storages.mount(storages)
                if not self._resolver.set(dns):
                    self._log("warning", "the guest has no resolv.conf to replace")
            except BaseException:
                await self._release()
                await shared.release()
                self._forget_directory(directory)
                raise
            self._id, self._shared, self._hooks = name, shared, hooks

    @runs_to_completion
    async def destroy(self) -> None:
        """Destroy the sandbox with all its containers, if it exists.

        Runs to completion.  If a container cannot be removed, the others still are, the sandbox stays, and this can be
        retried.
        """
        async with self._lock:
            if self._id is None or self._shared is None:
                return
            self._ending = True  # no new containers from here on
            try:
                for decided in list(self._creating.values()):
                    await decided.wait()
                removals = [self._remove(container) for container in self._containers.values()]
                for failure in await asyncio.gather(*removals, return_exceptions=True):
                    if failure is not None:
                        raise failure
                self._resolver.release()
                await self._release()
                await self._shared.release()
                self._forget_directory(self._state / self._id)
                self._id = self._shared = None
                self.oom_events.end()
            finally:
                self._ending = False

    async def _release(self) -> None:
        """Unmount the sandbox's own mounts."""
        await self._storages.unmount(self._mounts.pop("", []))
        await self._storages.release()

    def _forget_directory(self, directory: Path) -> None:
        try:
            directory.rmdir()
        except OSError as error:  # probably left by a killed agent: not ours to delete
            self._log("warning", "the sandbox's directory is not empty", path=str(directory), error=str(error))

    async def _share_pids(self, shared: SharedNamespaces) -> None:
        """Create the pid namespace that containers share, unless another caller has done so meanwhile."""
        async with self._lock:
            if self._shared is not shared:
                raise SandboxNotRunning
            if shared.procfs is None:
                try:
                    await shared.add_pid_namespace(self._launcher)
                except (OSError, LaunchError) as error:
                    raise FailedPrecondition(f"failed to create namespace: {error}") from error

    @property
    def empty(self) -> bool:
        """Whether it has no containers, not even one being created."""
        return not self._containers and not self._creating

    async def mount(self, storage: Storage) -> None:
        """Mount a storage that outlives all sandboxes.  Raises as Storages.mount."""
        await self._storages.mount([storage])

    async def resize(self, storages: Sequence[Storage]) -> None:
        """Change the options of existing tmpfs mounts.  Raises InvalidArgument or SystemCallFailed."""
        await self._storages.resize(storages)

    def container(self, container_id: str) -> Container:
        """Return a container by its id.  Raises ContainerNotFound."""
        container = self._containers.get(container_id)
        if container is None:
            raise ContainerNotFound(container_id=container_id)
        return container

    async def create(
        self,
        container_id: str,
        exec_id: str,
        spec: Spec,
        storages: Sequence[Storage] = (),
        devices: Sequence[GuestDevice] = (),
        *,
        share_pids: bool | None = None,
    ) -> Container:
        """Create a container, after mounting its `storages`, with the guest's numbers for its `devices`.

        With `share_pids` it joins the sandbox's pid namespace, which is created for the first that does; None leaves
        that to the sandbox.  On failure nothing is left and the id is free.
        """
        while container_id in self._creating:
            await self._creating[container_id].wait()  # ContainerExists means that it can be used
        if self._id is None or self._shared is None or self._ending:
            raise SandboxNotRunning
        check_id(container_id)
        if container_id in self._containers:
            raise ContainerExists(container_id=container_id)
        if spec.process is None or spec.root is None or not spec.root.path:
            raise InvalidArgument("the container's spec needs a process and a root path")
        from caisson.agent.guest.resources import set_parameters, take_network_parameters

        spec, parameters = take_network_parameters(spec)
        if share_pids is None:
            share_pids = self.shares_pids
        if share_pids and not self.shares_pids:
            await self._share_pids(self._shared)
        spec, join = adapt_to_guest(container_id, spec, self._open_files, self._hooks), dict(self._shared.paths)
        if not share_pids:
            join.pop("pid", None)
        if any(namespace.type == "user" for namespace in spec.linux.namespaces):
            for kind in SHARED:  # these are not its own, so it could neither mount mqueue nor have a host name
                join.pop(kind, None)
        directory = self._state / self._id / container_id
        try:
            directory.mkdir(mode=0o711)
        except FileExistsError:
            raise AlreadyExists(f"container with id exists: {container_id}") from None
        decided = self._creating[container_id] = asyncio.Event()
        try:
            if devices:
                from caisson.agent.guest.devices import assign_device_numbers

                spec = await assign_device_numbers(spec, devices, self._blocks)
            await asyncio.to_thread(set_parameters, parameters)
            if may_make_networks(spec):
                await asyncio.to_thread(modules.load_bridge, self._log)
            self._mounts[container_id] = await self._storages.mount(storages, container_id)
            procfs = self._shared.procfs if share_pids else None
            return await self._make(container_id, exec_id or container_id, spec, join, procfs)
        except BaseException:
            await self._unmake(container_id, directory)
            raise
        finally:
            del self._creating[container_id]
            decided.set()

    async def _unmake(self, container_id: str, directory: Path) -> None:
        """Remove the directory and the mounts of a container whose creation failed."""
        with suppress(OSError):
            directory.rmdir()
        await run_to_completion(self._storages.unmount(self._mounts.pop(container_id, [])))

    async def _make(
        self, container_id: str, exec_id: str, spec: Spec, join: dict[str, str], procfs: str | None
    ) -> Container:
        """Create a container in its directory, on its mounted storages.  On failure the directory is removed."""
        assert self._id is not None
        cgroup: Cgroup | None = None
        if self._cgroups is not None:
            cgroup = self._cgroups.create(spec.linux.cgroups_path or f"{self._id}/{container_id}")
        elif spec.linux.resources is not None:
            raise FailedPrecondition("linux.resources: there is no cgroup hierarchy in this guest")
        container = Container(
            container_id,
            spec,
            launcher=self._launcher,
            cgroup=cgroup,
            directory=self._state / self._id / container_id,
            pipe_size=self._pipe_size,
            bulk=self._bulk,
            log=self._log.bind(container_id=container_id),
            oom=lambda: self._out_of_memory(container_id),
        )
        try:
            await container.create(exec_id, join, procfs)
        except BaseException:
            await run_to_completion(container.remove())
            raise
        self._containers[container_id] = container
        return container

    async def recreate(self, container_id: str) -> None:
        """Create an exited container again, from its configuration and on the files that it left.

        Its program runs after Container.start.  Raises NotFound, NotStopped, and as `create`; when it cannot be created
        it is removed.
        """
        while container_id in self._creating:
            await self._creating[container_id].wait()
        old = self.container(container_id)
        if self._id is None or self._shared is None or self._ending:
            raise SandboxNotRunning
        if old.status != STOPPED:
            raise NotStopped(container_id=container_id, status=old.status)
        decided = self._creating[container_id] = asyncio.Event()
        directory = self._state / self._id / container_id
        try:
            await run_to_completion(old.remove())
            if self.container(container_id) is not old:  # or it was removed meanwhile
                raise ContainerNotFound(container_id=container_id)
            del self._containers[container_id]
            directory.mkdir(mode=0o711)
            await self._make(container_id, container_id, old.spec, *old.joined)
        except BaseException:
            if self._containers.get(container_id) is not old:
                await self._unmake(container_id, directory)
            raise
        finally:
            del self._creating[container_id]
            decided.set()

    async def ensure_running(self, container_id: str, spec: Callable[[], Spec]) -> bool:
        """Ensure that a container of this id is running: the existing one, or a new one from ``spec``.

        An exited one is replaced, and a missing sandbox is started.  Concurrent callers get the same container.
        Returns whether it was created for this caller.  Raises as `create` and Container.start.
        """
        while True:
            container = self._containers.get(container_id)
            created = container is None
            if container is None:
                try:
                    if not self.running:
                        await self.start("", "")
                    container = await self.create(container_id, "", spec())
                except (SandboxExists, ContainerExists):
                    continue  # another caller was faster
            if container.status == STOPPED:
                with suppress(ContainerNotFound):
                    await self.remove(container_id)
                continue
            if container.status == CREATED:
                try:
                    await container.start()
                except NotCreated:
                    continue
            return created

    async def update(self, container_id: str, resources: Resources) -> None:
        """Change the limits of a container.  Raises NotFound, and as Container.update."""
        from caisson.agent.guest.resources import fit

        await self.container(container_id).update(fit(resources))

    def allow_hotplugged_cpus(self) -> None:
        """Let containers use hot-plugged CPUs, except those restricted to certain ones."""
        for container in self._containers.values():
            container.allow_hotplugged_cpus()

    def _out_of_memory(self, container_id: str) -> None:
        self._log("warning", "the OOM killer killed a process", container_id=container_id)
        self.oom_events.add(container_id)

    async def remove(self, container_id: str, timeout: float | None = None) -> None:
        """Kill and remove a container.  Raises NotFound, or Timeout, after which removal continues."""
        work = run_to_completion(self._remove(self.container(container_id)))
        try:
            await asyncio.wait_for(work, timeout or None)
        except TimeoutError:
            raise RemovalTimeout(container_id=container_id, seconds=timeout) from None

    async def _remove(self, container: Container) -> None:
        try:
            await container.remove()
        except Exception as error:
            self._log("error", "a container could not be removed", container_id=container.id, error=str(error))
            raise
        async with self._unregistering:  # another remove of it waits, then finds nothing
            if self._containers.get(container.id) is container:
                await self._storages.unmount(self._mounts.pop(container.id, []))
                del self._containers[container.id]

"""The interface of both cgroup versions, and limits that are set all or none."""

from __future__ import annotations

import os

from caisson.agent.libcontainer.cgroups import files
from caisson.agent.libcontainer.errors import NO_PROCESS
from caisson.agent.libcontainer.waits import BlockingWaits
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType
    from typing import Protocol

    from caisson.agent.libcontainer.cgroups.events import OomWatch
    from caisson.agent.libcontainer.cgroups.stats import CgroupStats
    from caisson.agent.libcontainer.config.resources import DeviceRule, Resources
    from caisson.agent.libcontainer.waits import Waits

    class Hierarchy(Protocol):
        """The place where cgroups are created."""

        def create(self, path: str, *, below_own: bool = False) -> Cgroup:
            """Create the cgroup `path` (as in linux.cgroupsPath) below the parent, or below this process's own cgroups.

            Raises CgroupError, also if it is in use.
            """
            ...

        def place(self, path: str, *, below_own: bool = False) -> dict[str, str]:
            """Return the directories that `create` would make, by hierarchy.  Raises CgroupError."""
            ...

        def open(self, paths: Mapping[str, str]) -> Cgroup:
            """Open the cgroup with these directories (`Cgroup.paths`), which may be gone."""
            ...
else:
    Hierarchy = object

DELETE_TRIES = 10
FREEZE_TIMEOUT = 10.0
WHERE = "linux.resources"


class CgroupError(Exception):
    """A cgroup that could not be created, limited or removed; str() is the message for the user."""


class Setting(Record):
    """A value that a field of the configuration asks for, and the file that it goes to.

    `fallbacks` are other files with their values for kernels without the first.  `optional`: on a kernel without any of
    the files the value is in force anyway.  `unreliable`: some kernels accept the value and ignore it.
    """

    field: str
    file: str
    value: str
    fallbacks: tuple[tuple[str, str], ...] = ()
    optional: bool = False
    unreliable: bool = False


class Cgroup:
    """One cgroup of a container, in one hierarchy or in several."""

    #: The directory named in messages, and the one in which its processes are counted.
    path: str
    #: A directory for clone3(CLONE_INTO_CGROUP), -1 if processes cannot be created in it.
    fd: int

    def __init__(self, made: set[str], waits: Waits | None = None) -> None:
        """``made`` are directories created for it and others like it: parents are removed with the last in them."""
        self._made = made
        self._waits: Waits = waits or BlockingWaits()
        self._devices: tuple[DeviceRule, ...] | None = None

    @property
    def paths(self) -> Mapping[str, str]:
        """Its directories by controllers ("cpu,cpuacct"); the one of cgroup v2 is by ""."""
        raise NotImplementedError

    @property
    def by_controller(self) -> dict[str, str]:
        """Its directories by every single controller, as state.json has them."""
        return {controller: path for name, path in self.paths.items() for controller in name.split(",")}

    def join_files(self) -> list[str]:
        """Return the files that a process writes itself to in order to join; none if it is created in the cgroup."""
        return []

    def join_fds(self) -> JoinFds:
        """Open the descriptors by which nsexec joins it, for a `with` block; by nsexec's names for them.

        Raises CgroupError.
        """
        return JoinFds(self.path, self.fd, self.join_files())

    def join_fds_of(self, pid: int) -> JoinFds:
        """Open the same for the nested cgroup that a process is in: a cgroup that delegates controllers to its children
        accepts no process (EBUSY), as happens when systemd or a container engine runs in the container.

        Takes time where there are many cgroups below.  Raises CgroupError if the process is in none of them.
        """
        fd = files.open_around(self.path, pid)
        if fd < 0:
            raise CgroupError(f"cgroup {self.path}: process {pid} is not in it")
        return JoinFds(self.path, fd, [], owned=True)

    def pids(self) -> list[int]:
        """List all processes in it and below; none if it has been removed.  Takes time where there are many cgroups
        below.
        """
        return files.pids_in(self.path)

    async def kill(self) -> None:
        """Send SIGKILL to every process in it, without racing against forks.  Raises CgroupError."""
        raise NotImplementedError

    async def freeze(self) -> None:
        """Freeze every process in it; returns once all are frozen.  Raises CgroupError."""
        raise NotImplementedError

    async def thaw(self) -> None:
        """Thaw it.  Raises CgroupError."""
        raise NotImplementedError

    async def delete(self) -> None:
        """Remove it and all below.  Retries while the kernel tears down dead processes.  Raises CgroupError."""
        left = list(self.paths.values())
        pause = 0.001
        for attempt in range(DELETE_TRIES):
            left = [path for path in left if not await self._remove(path)]
            if not left:
                break
            if attempt == DELETE_TRIES - 1:
                raise CgroupError(f"cgroup {left[0]}: cannot be removed: there are processes in it")
            await self._waits.sleep(pause)
            pause *= 2
        self.close()
        for path in self.paths.values():
            self._made.discard(path)
            files.remove_around(path, self._made)

    async def _remove(self, path: str) -> bool:
        """Remove one of its directories and all below; False while it has processes.  Raises CgroupError."""
        try:
            return await self._waits.work(lambda: files.remove_tree(path))
        except OSError as e:
            raise CgroupError(f"cgroup {path}: cannot be removed: {e.strerror}") from e

    def close(self) -> None:
        """Close descriptors; the cgroup stays.  Idempotent."""

    def settings(self, resources: Resources) -> Iterable[Setting]:
        """Return the limits in an order that the kernel accepts.  Raises SpecError for what this version lacks."""
        raise NotImplementedError

    def file(self, name: str) -> str | None:
        """Return the path of a file of the cgroup; None if its controller is not available."""
        raise NotImplementedError

    def controllers(self) -> frozenset[str]:
        """Return the controllers available to it."""
        raise NotImplementedError

    def read(self, name: str) -> str | None:
        """Read a file of it, None without it."""
        path = self.file(name)
        try:
            return None if path is None else files.read(path)
        except OSError:
            return None

    def allow_devices(self, rules: tuple[DeviceRule, ...]) -> None:
        """Apply device rules, replacing the previous ones.  Raises CgroupError."""
        raise NotImplementedError

    def apply(self, resources: Resources, *, devices: bool = True) -> None:
        """Set limits and device rules of a new cgroup; device rules are not possible in a user namespace.

        Raises CgroupError naming what this machine does not support.
        """
        self._check_usage(resources)
        for setting in self.settings(resources):
            self._set(setting, None)
        if devices:
            self.allow_devices(resources.devices)
        self._devices = resources.devices

    async def update(self, resources: Resources) -> None:
        """Change limits and device rules, all or none: on failure the previous values are restored.

        Raises SpecError or CgroupError naming the field that cannot be set.
        """
        undo: list[tuple[str, str]] = []
        try:
            self._check_usage(resources)
            for setting in self.settings(resources):
                self._set(setting, undo)
            if resources.devices != self._devices:
                await self._change_devices(resources.devices)
                self._devices = resources.devices
        except BaseException as error:
            lost = self._roll_back(undo)
            if lost and isinstance(error, CgroupError):
                raise CgroupError(
                    f"{error}; and the previous values could not be restored: {', '.join(lost)}"
                ) from error
            raise

    async def _change_devices(self, rules: tuple[DeviceRule, ...]) -> None:
        self.allow_devices(rules)

    def allow_hotplugged_cpus(self, *, above_only: bool) -> None:
        """Allow new CPUs to it, or only to the cgroups above it.  Raises CgroupError.

        Nothing to do in cgroup v2: a cgroup without explicit CPUs has all of its parent's.
        """

    def stats(self) -> CgroupStats:
        """Read its usage so far; zeros where nothing is counted.  Reads many files, and may be called from a thread."""
        raise NotImplementedError

    def oom_kills(self) -> int:
        """Return how many of its processes the OOM killer has killed."""
        raise NotImplementedError

    def oom_watch(self, killed: Callable[[], object]) -> OomWatch | None:
        """Watch for OOM kills: `killed` is called on each.

        None on a machine without memory accounting.  The caller closes it.  Raises CgroupError.
        """
        raise NotImplementedError

    def known_devices(self, rules: tuple[DeviceRule, ...]) -> None:
        """Record the device rules already in force in a cgroup that was opened."""
        self._devices = rules

    @property
    def exists(self) -> bool:
        """Whether it exists."""
        return os.path.isdir(self.path)  # noqa: PTH112 - no pathlib at start

    @property
    def frozen(self) -> bool:
        """Whether all of it is frozen."""
        raise NotImplementedError

    def _check_usage(self, resources: Resources) -> None:
        """Reject a limit below current usage, which would kill processes, if memory.checkBeforeUpdate is set."""
        memory = resources.memory
        if not memory.check_before_update:
            return
        usage, swap = self._memory_in_use()
        for field, what, limit, used in (
            ("limit", "memory", memory.limit, usage),
            ("swap", "memory+swap", memory.swap, usage + swap),
        ):
            if limit is not None and 0 < limit < used:
                words = f"rejecting {what} limit {limit}: it is below the {used} bytes in use"
                raise CgroupError(f"{WHERE}.memory.{field}: {words}")

    def _memory_in_use(self) -> tuple[int, int]:
        """Read the bytes of memory, and of swap."""
        raise NotImplementedError

    def _set(self, setting: Setting, undo: list[tuple[str, str]] | None) -> None:
        """Write one value; with `undo`, record the previous one there, and skip a value that is already set."""
        field = setting.field
        for file, value in ((setting.file, setting.value), *setting.fallbacks):
            path = self.file(file)
            try:
                if path is None or not os.path.exists(path):  # noqa: PTH110 - no pathlib at start
                    continue
                before = None if undo is None else files.restore_value(file, value, files.read(path))
                if before == value:
                    return
                files.write(path, value)
                if undo is not None and before is not None:
                    undo.append((path, before))
                if setting.unreliable and int(files.read(path)) > int(value):
                    raise CgroupError(f"{field}: {file} = {value!r}: this kernel does not support it")
            except OSError as e:
                raise CgroupError(f"{field}: {file} = {value!r}: {e.strerror}") from e
            return
        if not setting.optional:
            self._missing(field, setting.file)

    def _missing(self, field: str, file: str) -> None:
        controller = file.partition(".")[0]
        if controller in self.controllers():
            raise CgroupError(f"{field}: this kernel has no {file}")
        raise CgroupError(f"{field}: the cgroup controller {controller!r} is not available here")

    def _roll_back(self, undo: list[tuple[str, str]]) -> list[str]:
        """Restore the previous values, the last first.  Returns the files that reject theirs."""
        lost = []
        for path, before in reversed(undo):
            try:
                files.write(path, before)
            except OSError as e:
                lost.append(f"{os.path.basename(path)} = {before!r} ({e.strerror})")  # noqa: PTH119
        return lost


class JoinFds:
    """Descriptors of a cgroup for nsexec, open inside a `with` block; `fd` is closed by it if it is `owned`."""

    def __init__(self, path: str, fd: int, join_files: list[str], *, owned: bool = False) -> None:
        self._path = path
        self._fd = fd
        self._owned = owned
        self._join_files = join_files
        self._fds: dict[str, int] = {}

    def __enter__(self) -> dict[str, int]:
        if self._fd >= 0:
            return {"_CAISSON_CGROUP": self._fd}
        if not self._join_files:
            raise CgroupError(f"cgroup {self._path}: is closed")
        for number, path in enumerate(self._join_files):
            try:
                self._fds[f"_CAISSON_CGROUP_{number}"] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            except OSError as e:
                self._close()
                raise CgroupError(f"cgroup {path}: {e.strerror}") from e
        return dict(self._fds)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def __del__(self) -> None:
        self._close()  # opened in a thread for a caller who has stopped waiting

    def _close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        if self._owned and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def signal_pids(pids: Iterable[int], number: int) -> None:
    """Signal processes that are not children, through pidfds; any that has exited is ignored."""
    import signal

    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, number)
            finally:
                os.close(pidfd)
        except OSError as error:
            if error.errno not in NO_PROCESS:
                raise


def own_cgroups() -> dict[str, str]:
    """Read this process's cgroups by controllers ("cpu,cpuacct", "name=systemd"; "" is version 2)."""
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as lines:  # noqa: PTH123 - no pathlib at start
        rows = (line.rstrip("\n").split(":", 2) for line in lines)
        return {name: path for _, name, path in rows}


def check_unused(path: str, pids: list[int], *, frozen: bool) -> None:
    """Reject a cgroup that is in use.  Raises CgroupError."""
    if pids:
        raise CgroupError(f"cgroup {path}: container's cgroup is not empty: {len(pids)} process(es) found")
    if frozen:
        raise CgroupError(f"cgroup {path}: container's cgroup unexpectedly frozen")


def parts_of(path: str) -> list[str]:
    """Return the parts of linux.cgroupsPath.  Raises CgroupError for a path that leads elsewhere."""
    parts = [part for part in path.split("/") if part]
    if not parts or any(part in (".", "..") or "\0" in part or "\n" in part or len(part) > 255 for part in parts):
        raise CgroupError(f"cgroup path {path!r} is not one")
    return parts

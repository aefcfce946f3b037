"""What both versions of cgroups have in common: the interface, and limits that are set all or not at all."""

from __future__ import annotations

import os

from caisson.agent.base.record import Record
from caisson.agent.libcontainer.cgroups import files
from caisson.agent.libcontainer.waits import BlockingWaits

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
        """Where cgroups are made."""

        def create(self, path: str, *, below_own: bool = False) -> Cgroup:
            """Make the cgroup `path` (as in linux.cgroupsPath): below the parent, or below this process's own cgroups.

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
    """A cgroup that could not be made, limited or removed; str() is the sentence for the user."""


class Setting(Record):
    """A value that a field of the configuration asks for, and the file that it goes to.

    `fallbacks` are other files with their values for kernels without the first.  `optional`: what is asked for is so
    anyway on a kernel that has none of the files.  `unreliable`: some kernels take the value and do nothing.
    """

    field: str
    file: str
    value: str
    fallbacks: tuple[tuple[str, str], ...] = ()
    optional: bool = False
    unreliable: bool = False


class Cgroup:
    """One cgroup of a container, in one hierarchy or in several."""

    #: The directory that stands for it in messages, and the one that its processes are counted in.
    path: str
    #: A directory for clone3(CLONE_INTO_CGROUP), -1 where processes cannot be born in it.
    fd: int

    def __init__(self, waits: Waits | None = None) -> None:
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
        """Return files that a process writes itself to in order to move in; none where it had better be born in it."""
        return []

    def join_fds(self, *, joins_pidns: bool = False) -> JoinFds:
        """Open descriptors by which nsexec gets into it, for a `with` block; by the names that it has for them.

        With `joins_pidns`, being born in it takes nsexec one more stage.  Raises CgroupError.
        """
        files = self.join_files()
        return JoinFds(self.path, -1 if joins_pidns and files else self.fd, files)

    def join_fds_of(self, pid: int) -> JoinFds:
        """Open the same of the cgroup below it that a process is in: one that has given controllers to cgroups below
        takes no process (EBUSY), as happens where systemd or a container engine runs in the container.

        Takes time where there are many cgroups below.  Raises CgroupError if the process is in none of them.
        """
        fd = files.open_around(self.path, pid)
        if fd < 0:
            raise CgroupError(f"cgroup {self.path}: process {pid} is not in it")
        return JoinFds(self.path, fd, [], owned=True)

    def pids(self) -> list[int]:
        """List all processes in it and below, none if it is gone.  Takes time where there are many cgroups below."""
        return files.pids_in(self.path)

    async def kill(self) -> None:
        """SIGKILL to everything in it, without a race against forks.  Raises CgroupError."""
        raise NotImplementedError

    async def freeze(self) -> None:
        """Stop everything in it; returns once it stands still.  Raises CgroupError."""
        raise NotImplementedError

    async def thaw(self) -> None:
        """Let it go on.  Raises CgroupError."""
        raise NotImplementedError

    async def delete(self) -> None:
        """Remove it and all below.  Retries while the kernel still tears down dead processes.  Raises CgroupError."""
        raise NotImplementedError

    def close(self) -> None:
        """Close descriptors; the cgroup stays.  Idempotent."""

    def settings(self, resources: Resources) -> Iterable[Setting]:
        """Return the limits in an order that the kernel takes.  Raises SpecError for what this version has not."""
        raise NotImplementedError

    def file(self, name: str) -> str | None:
        """Return the path of a file of the cgroup; None if its controller is not there."""
        raise NotImplementedError

    def controllers(self) -> frozenset[str]:
        """Return the controllers that there are for it."""
        raise NotImplementedError

    def read(self, name: str) -> str | None:
        """Read a file of it, None without it."""
        path = self.file(name)
        try:
            return None if path is None else files.read(path)
        except OSError:
            return None

    def allow_devices(self, rules: tuple[DeviceRule, ...]) -> None:
        """Put device rules in force, in the place of those before.  Raises CgroupError."""
        raise NotImplementedError

    def apply(self, resources: Resources, *, devices: bool = True) -> None:
        """Set limits and device rules of a new cgroup; in a user namespace there can be no device rules.

        Raises CgroupError naming what this machine cannot do.
        """
        self._check_usage(resources)
        for setting in self.settings(resources):
            self._set(setting, None)
        if devices:
            self.allow_devices(resources.devices)
        self._devices = resources.devices

    async def update(self, resources: Resources) -> None:
        """Change limits and device rules, all or none: after a failure the values before are in force again.

        Raises SpecError or CgroupError, which name the field that cannot be set.
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
            lost = self._take_back(undo)
            if lost and isinstance(error, CgroupError):
                raise CgroupError(
                    f"{error}; and the previous values could not be restored: {', '.join(lost)}"
                ) from error
            raise

    async def _change_devices(self, rules: tuple[DeviceRule, ...]) -> None:
        self.allow_devices(rules)

    def allow_hotplugged_cpus(self, *, above_only: bool) -> None:
        """Allow new CPUs to it, or only to the cgroups above it.  Raises CgroupError.

        In cgroup v2 there is nothing to do: who is given no CPUs by number has all of those above.
        """

    def stats(self) -> CgroupStats:
        """Read what it has used so far; zeros where nobody counts.  Reads many files, and may be called in a thread."""
        raise NotImplementedError

    def oom_kills(self) -> int:
        """Return how many of its processes the kernel has ended for want of memory."""
        raise NotImplementedError

    def oom_watch(self, killed: Callable[[], object]) -> OomWatch | None:
        """Watch for processes that the kernel ends for want of memory: `killed` is called then.

        None on a machine on which nobody counts memory.  The caller closes it.  Raises CgroupError.
        """
        raise NotImplementedError

    def known_devices(self, rules: tuple[DeviceRule, ...]) -> None:
        """Note the device rules that are in force in a cgroup that was opened."""
        self._devices = rules

    @property
    def exists(self) -> bool:
        """Whether it is there."""
        return os.path.isdir(self.path)  # noqa: PTH112 - no pathlib at start

    @property
    def frozen(self) -> bool:
        """Whether all of it is frozen."""
        raise NotImplementedError

    def _check_usage(self, resources: Resources) -> None:
        """Refuse a limit below what is in use, which would end processes, where memory.checkBeforeUpdate says so."""
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
        """Write one value; what was before goes to `undo`, and what is so already is left alone then."""
        field = setting.field
        for file, value in ((setting.file, setting.value), *setting.fallbacks):
            path = self.file(file)
            try:
                if path is None or not os.path.exists(path):  # noqa: PTH110 - no pathlib at start
                    continue
                before = None if undo is None else files.restoring(file, value, files.read(path))
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

    def _take_back(self, undo: list[tuple[str, str]]) -> list[str]:
        """Write what was before, the last first.  Returns the files that do not take it."""
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

    def _close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        if self._owned and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def signal_pid(pid: int, number: int) -> None:
    """Signal a process that is not a child, by way of its pidfd.  Raises ProcessLookupError."""
    import signal

    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, number)
    finally:
        os.close(pidfd)


def own_cgroups(file: str = "/proc/self/cgroup") -> dict[str, str]:
    """Read this process's cgroups by controllers ("cpu,cpuacct", "name=systemd"; "" is version 2)."""
    with open(file, encoding="utf-8", errors="surrogateescape") as lines:  # noqa: PTH123 - no pathlib at start
        rows = (line.rstrip("\n").split(":", 2) for line in lines)
        return {name: path for _, name, path in rows}


def check_unused(path: str, pids: list[int], *, frozen: bool) -> None:
    """Refuse a cgroup that is in use.  Raises CgroupError."""
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

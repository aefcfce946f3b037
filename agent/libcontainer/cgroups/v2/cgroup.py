"""cgroup v2: a container's cgroup, its limits and its end.  https://docs.kernel.org/admin-guide/cgroup-v2.html

Writing a pid to cgroup.procs costs an RCU grace period (about 15 ms), and where favordynmods spares that, it waits for
every process that is being forked, also those of a container whose turn on the CPU comes seldom.  Processes are
therefore created in their cgroup, through the directory descriptor `Cgroup.fd`.
"""

from __future__ import annotations

import os

from caisson.agent.base.mountinfo import PATH, mounts
from caisson.agent.libcontainer.cgroups import files
from caisson.agent.libcontainer.cgroups.base import (
    FREEZE_TIMEOUT,
    Cgroup,
    CgroupError,
    Hierarchy,
    check_unused,
    own_cgroups,
    parts_of,
)
from caisson.agent.libcontainer.waits import Deadline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from caisson.agent.libcontainer.cgroups.base import Setting
    from caisson.agent.libcontainer.cgroups.events import OomWatch
    from caisson.agent.libcontainer.cgroups.stats import CgroupStats
    from caisson.agent.libcontainer.config.resources import DeviceRule, Resources
    from caisson.agent.libcontainer.waits import Waits


#: Cgroups below a container's own: more than systemd running an engine creates, few enough to walk.
NESTING = {"cgroup.max.depth": "32", "cgroup.max.descendants": "2048"}


class HierarchyV2(Hierarchy):
    """The cgroup v2 hierarchy of this machine.  With `bounded`, a container may nest only a few cgroups in its own."""

    def __init__(self, root: str, parent: str = "", waits: Waits | None = None, *, bounded: bool = False) -> None:
        self.root = root
        self._nesting = NESTING if bounded else {}
        self._parent = parent
        self._waits = waits
        self._made: set[str] = set()  # directories to remove with the last cgroup in them

    @classmethod
    def find(
        cls,
        parent: str = "",
        mountinfo: str = PATH,
        waits: Waits | None = None,
        *,
        bounded: bool = False,
    ) -> HierarchyV2 | None:
        """Find where cgroup2 is mounted; None if it is not.  On a hybrid host that is /sys/fs/cgroup/unified.

        All cgroups are created below the cgroup `parent`, which is created with the first and removed with the last.
        """
        for point, fstype, *_ in mounts(mountinfo):
            if fstype == "cgroup2":
                return cls(point, parent, waits, bounded=bounded)
        return None

    def create(self, path: str, *, below_own: bool = False) -> CgroupV2:
        """Make the cgroup `path` (as in linux.cgroupsPath, below the parent) with all available controllers.

        Raises CgroupError, also if it is in use.
        """
        directory = self.place(path, below_own=below_own)[""]
        at = self.root
        made: list[str] = []
        try:
            for part in directory.removeprefix(f"{at}/").split("/"):
                _enable_controllers(at)
                at = f"{at}/{part}"
                try:
                    os.mkdir(at, 0o755)  # noqa: PTH102 - no pathlib at start
                    made.append(at)
                except FileExistsError:
                    pass
            for name, value in self._nesting.items():
                files.write(f"{at}/{name}", value)
            cgroup = CgroupV2(at, self._made, self._waits)
        except OSError as e:
            files.remove_all(made)
            raise CgroupError(f"cgroup {path}: {(e.strerror or '').lower()}") from e
        try:
            check_unused(path, [] if at in made else cgroup.pids(), frozen=cgroup.frozen)
        except CgroupError:
            cgroup.close()
            files.remove_all(made)
            raise
        if not below_own:
            self._made.update(made)
        return cgroup

    def place(self, path: str, *, below_own: bool = False) -> dict[str, str]:
        """Return the directory that `create` would make."""
        parent = _own_parent() if below_own else self._parent
        return {"": "/".join([self.root, *(part for part in parent.split("/") if part), *parts_of(path)])}

    def open(self, paths: Mapping[str, str]) -> CgroupV2:
        """Open the cgroup with these directories, which may be gone."""
        return CgroupV2(paths[""], set(), self._waits)


class CgroupV2(Cgroup):
    """One cgroup.  `fd` is its directory, for clone3(CLONE_INTO_CGROUP); -1 if it is gone."""

    def __init__(self, path: str, made: set[str], waits: Waits | None = None) -> None:
        super().__init__(made, waits)
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            self.fd = -1

    @property
    def paths(self) -> Mapping[str, str]:
        return {"": self.path}

    def file(self, name: str) -> str:
        return f"{self.path}/{name}"

    def controllers(self) -> frozenset[str]:
        return frozenset((self.read("cgroup.controllers") or "").split())

    def settings(self, resources: Resources) -> Iterable[Setting]:
        from caisson.agent.libcontainer.cgroups.v2.settings import settings

        return settings(resources, self.read)

    async def kill(self) -> None:
        """Send SIGKILL to every process in it, atomically (Linux 5.14).  Raises CgroupError."""
        try:
            files.write(self.file("cgroup.kill"), "1")
        except FileNotFoundError:
            return
        except OSError as e:
            raise CgroupError(f"cgroup {self.path}: kill: {e.strerror}") from e

    async def freeze(self) -> None:
        await self._freezer("1")

    async def thaw(self) -> None:
        await self._freezer("0")

    @property
    def frozen(self) -> bool:
        """Whether all of it is frozen."""
        return "frozen 1" in (self.read("cgroup.events") or "").splitlines()

    async def _freezer(self, value: str) -> None:
        from caisson.agent.libcontainer.cgroups.events import FileWatch

        deadline = Deadline(FREEZE_TIMEOUT)
        try:
            watch = FileWatch(self.file("cgroup.events"), lambda: None)
            try:
                files.write(self.file("cgroup.freeze"), value)
                while self.frozen != (value == "1"):
                    if watch.fileno() < 0 or not await self._waits.readable(watch.fileno(), seconds=deadline.left):
                        files.write(self.file("cgroup.freeze"), "0")
                        raise CgroupError(f"cgroup {self.path}: did not freeze within {FREEZE_TIMEOUT:g} s")
                    watch.on_readable()
            finally:
                watch.close()
        except OSError as e:
            raise CgroupError(f"cgroup {self.path}: freezer: {e.strerror}") from e

    def stats(self) -> CgroupStats:
        from caisson.agent.libcontainer.cgroups.v2 import stats as v2_stats

        return v2_stats.read(self.path, lambda: len(self.pids()))

    def oom_kills(self) -> int:
        from caisson.agent.libcontainer.cgroups.events import oom_kills
        from caisson.agent.libcontainer.cgroups.stats import CgroupDirectory

        return oom_kills(CgroupDirectory(self.path), "memory.events")

    def oom_watch(self, killed: Callable[[], object]) -> OomWatch | None:
        from caisson.agent.libcontainer.cgroups.events import FileWatch, OomCounter

        try:
            return FileWatch(self.file("memory.events"), OomCounter(self.oom_kills, killed).check)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise CgroupError(f"cgroup {self.path}: memory.events: {e.strerror}") from e

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def allow_devices(self, rules: tuple[DeviceRule, ...]) -> None:
        """Replace one program by another atomically."""
        from caisson.agent.libcontainer.cgroups import device_program

        try:
            device_program.attach(self.fd, rules)
        except OSError as e:
            raise CgroupError(f"linux.resources.devices: eBPF device program: {e.strerror}") from e

    def _memory_in_use(self) -> tuple[int, int]:
        return int(self.read("memory.current") or 0), int(self.read("memory.swap.current") or 0)


def _own_parent() -> str:
    """Return the parent of this process's cgroup: its own has processes, and cannot delegate controllers."""
    return os.path.dirname(own_cgroups().get("", ""))  # noqa: PTH120 - no pathlib at start


def _enable_controllers(path: str) -> None:
    """Enable all controllers of `path` for its children; failures surface when a limit is set."""
    available = set(files.read(f"{path}/cgroup.controllers").split())
    for controller in available - set(files.read(f"{path}/cgroup.subtree_control").split()):
        try:
            files.write(f"{path}/cgroup.subtree_control", f"+{controller}")
        except OSError:
            continue

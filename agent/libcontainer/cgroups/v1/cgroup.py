"""cgroup v1: a container's cgroup in every hierarchy.  https://docs.kernel.org/admin-guide/cgroup-v1/index.html

A process cannot be created in a v1 cgroup by clone3.  nsexec's first stage therefore joins each of them before it
creates anything: its children are in them from their first instruction on, and no descriptor of them is passed on.
Hierarchies without a controller (name=systemd) limit nothing, and are ignored.
"""

from __future__ import annotations

import os

from caisson.agent.base.mountinfo import PATH, mounts
from caisson.agent.libcontainer.cgroups import files
from caisson.agent.libcontainer.cgroups.base import (
    FREEZE_TIMEOUT,
    WHERE,
    Cgroup,
    CgroupError,
    Hierarchy,
    check_unused,
    own_cgroups,
    parts_of,
    signal_pids,
)
from caisson.agent.libcontainer.cgroups.v1 import devices as v1_devices
from caisson.agent.libcontainer.cgroups.v1.ancestors import chain, fill_cpuset, raise_realtime, widen_cpuset
from caisson.agent.libcontainer.cgroups.v1.settings import settings
from caisson.agent.libcontainer.waits import wait_until

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from caisson.agent.libcontainer.cgroups.base import Setting
    from caisson.agent.libcontainer.cgroups.events import OomWatch
    from caisson.agent.libcontainer.cgroups.stats import CgroupStats
    from caisson.agent.libcontainer.config.resources import DeviceRule, Resources
    from caisson.agent.libcontainer.waits import Waits

#: Superblock options of a hierarchy that are not controllers.
FLAGS = frozenset(("rw", "ro", "none", "noprefix", "xattr", "clone_children", "cpuset_v2_mode", "favordynmods"))

#: The representative hierarchy, if mounted: the freezer, in which processes can be counted while none forks.
FIRST = ("freezer", "pids", "memory", "cpu", "devices")
MAX_KILL_ROUNDS = 50
NAME = "name="  # of a hierarchy without a controller
KILL_FREEZE_TIMEOUT = 0.2


class HierarchyV1(Hierarchy):
    """The cgroup v1 hierarchies of this machine: mount points by their controllers ("cpu,cpuacct")."""

    def __init__(self, roots: Mapping[str, str], parent: str = "", waits: Waits | None = None) -> None:
        self.roots = roots
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
        every: bool = False,
    ) -> HierarchyV1 | None:
        """Find the mounted hierarchies with controllers; None if there are none.

        With `every`, also those without controllers: "name=systemd", and "" for version 2 of a hybrid host.  All
        cgroups are created below the cgroup `parent`, which is created with the first and removed with the last.
        """
        roots: dict[str, str] = {}
        for point, fstype, _, text in mounts(mountinfo):
            if every and fstype == "cgroup2":
                roots.setdefault("", point)
            if fstype != "cgroup":
                continue
            options = text.split(",")
            name = ",".join(option for option in options if option not in FLAGS and "=" not in option)
            if not name and every:
                name = next((option for option in options if option.startswith(NAME)), "")
            if name:
                roots.setdefault(name, point)
        return cls(roots, parent, waits) if any(name and not name.startswith(NAME) for name in roots) else None

    def create(self, path: str, *, below_own: bool = False) -> CgroupV1:
        """Make the cgroup `path` (as in linux.cgroupsPath, below the parent) in every hierarchy.

        Raises CgroupError, also if it is in use.
        """
        made: list[str] = []
        directories = self.place(path, below_own=below_own)
        try:
            for name, directory in directories.items():
                root = self.roots[name]
                parts = directory.removeprefix(f"{root}/").split("/")
                _make(root, parts, made, fill_cpuset if "cpuset" in name.split(",") else None)
            cgroup = CgroupV1(directories, self.roots, self._made, self._waits)
            frozen = cgroup.frozen
            for directory in directories.values():
                check_unused(path, [] if directory in made else files.pids_in(directory), frozen=frozen)
        except OSError as e:
            files.remove_all(made)
            raise CgroupError(f"cgroup {path}: {e.filename}: {(e.strerror or '').lower()}") from e
        except CgroupError:
            files.remove_all(made)
            raise
        if not below_own:
            self._made.update(made)
        return cgroup

    def place(self, path: str, *, below_own: bool = False) -> dict[str, str]:
        """Return the directories that `create` would make, by hierarchy."""
        own = own_cgroups() if below_own else {}
        found = {}
        for name, root in self.roots.items():
            parent = own.get(name, "") if below_own else self._parent
            found[name] = "/".join([root, *(part for part in parent.split("/") if part), *parts_of(path)])
        return found

    def open(self, paths: Mapping[str, str]) -> CgroupV1:
        """Open the cgroup with these directories, which may be gone."""
        return CgroupV1(paths, self.roots, set(), self._waits)


def _make(root: str, parts: list[str], made: list[str], fill: Callable[[str, str], None] | None) -> None:
    """Create a directory in one hierarchy, level by level; adds new ones to `made`."""
    at = root
    for part in parts:
        above, at = at, f"{at}/{part}"
        try:
            os.mkdir(at, 0o755)  # noqa: PTH102 - no pathlib at start
            made.append(at)
        except FileExistsError:
            pass
        if fill is not None:
            fill(above, at)


class CgroupV1(Cgroup):
    """One cgroup in several hierarchies: `directories` and `roots` are by their controllers."""

    fd = -1

    def __init__(
        self, directories: Mapping[str, str], roots: Mapping[str, str], made: set[str], waits: Waits | None = None
    ) -> None:
        super().__init__(made, waits)
        self._directories = {controller: path for name, path in directories.items() for controller in name.split(",")}
        self._roots = {controller: path for name, path in roots.items() for controller in name.split(",")}
        self._paths = dict(directories)
        first = next((name for name in FIRST if name in self._directories), next(iter(self._directories)))
        self.path = self._directories[first]

    @property
    def paths(self) -> Mapping[str, str]:
        return self._paths

    def join_files(self) -> list[str]:
        # The freezer comes last: a process that joins a frozen one gets no further.
        return [
            f"{path}/cgroup.procs" for _, path in sorted(self._paths.items(), key=lambda item: "freezer" in item[0])
        ]

    def file(self, name: str) -> str | None:
        directory = self._directories.get(name.partition(".")[0])
        return None if directory is None else f"{directory}/{name}"

    def controllers(self) -> frozenset[str]:
        return frozenset(name for name in self._directories if name and not name.startswith(NAME))

    def settings(self, resources: Resources) -> Iterable[Setting]:
        for setting in settings(resources, self.read):
            controller = setting.file.partition(".")[0]
            directory, root = self._directories.get(controller), self._roots.get(controller)
            if directory is not None and root is not None:
                try:
                    if controller == "cpuset":
                        widen_cpuset(root, directory, setting.file, setting.value)
                    elif setting.file.startswith("cpu.rt_"):
                        raise_realtime(root, directory, resources.cpu.realtime_runtime, resources.cpu.realtime_period)
                except OSError as e:
                    raise CgroupError(f"{setting.field}: {e.filename}: {e.strerror}") from e
            yield setting

    async def freeze(self) -> None:
        """Freeze every process in it; retried, because forks meanwhile escape the kernel's list."""
        if "freezer" not in self._directories:
            raise CgroupError(f"cgroup {self.path}: the cgroup controller 'freezer' is not available here")
        if not await self._freezer("FROZEN", FREEZE_TIMEOUT):
            self._write_freezer("THAWED")
            raise CgroupError(f"cgroup {self.path}: did not freeze within {FREEZE_TIMEOUT:g} s")

    async def thaw(self) -> None:
        if "freezer" in self._directories:
            await self._freezer("THAWED", FREEZE_TIMEOUT)

    @property
    def frozen(self) -> bool:
        """Whether all of it is frozen."""
        return (self.read("freezer.state") or "").strip() == "FROZEN"

    async def _freezer(self, state: str, seconds: float) -> bool:
        def reached() -> bool:
            self._write_freezer(state)
            return (self.read("freezer.state") or "").strip() == state

        return await wait_until(reached, seconds, self._waits)

    def _write_freezer(self, state: str) -> None:
        path = self.file("freezer.state")
        if path is None:
            return
        try:
            files.write(path, state)
        except OSError as e:
            raise CgroupError(f"cgroup {self.path}: freezer: {e.strerror}") from e

    async def kill(self) -> None:
        """Send SIGKILL to every process in it while it is frozen, so that none can fork, and then thaw it to let them
        die.
        """
        frozen = False
        for _ in range(MAX_KILL_ROUNDS):
            if not os.path.isdir(self.path) or not await self._waits.work(self.pids):  # noqa: PTH112 - no pathlib at start
                break
            if "freezer" in self._directories:
                frozen = await self._freezer("FROZEN", KILL_FREEZE_TIMEOUT)
            signal_pids(await self._waits.work(self.pids), 9)
            if "freezer" in self._directories:
                self._write_freezer("THAWED")
            if frozen:
                break
            await self._waits.sleep(0.005)
        if "freezer" in self._directories and os.path.isdir(self.path):  # noqa: PTH112
            self._write_freezer("THAWED")

    def allow_devices(self, rules: tuple[DeviceRule, ...]) -> None:
        """Change the kernel's list step by step into what the rules amount to, and verify it."""
        directory = self._directories.get("devices")
        if directory is None:
            raise CgroupError(f"{WHERE}.devices: the cgroup controller 'devices' is not available here")
        before = None if self._devices is None else v1_devices.resolve(self._devices)
        v1_devices.apply(directory, before, v1_devices.resolve(rules))

    async def _change_devices(self, rules: tuple[DeviceRule, ...]) -> None:
        before = v1_devices.resolve(self._devices or ())
        # Switching between "all but" and "none but" leaves a moment with neither; no process may run in it.
        still = before.default != v1_devices.resolve(rules).default and not self.frozen
        if still:
            await self.freeze()
        try:
            self.allow_devices(rules)
        except CgroupError:
            v1_devices.apply(self._directories["devices"], None, before)
            raise
        finally:
            if still:
                await self.thaw()

    def allow_hotplugged_cpus(self, *, above_only: bool) -> None:
        root, directory = self._roots.get("cpuset"), self._directories.get("cpuset")
        if root is None or directory is None or not os.path.exists(f"{directory}/cpuset.cpus"):  # noqa: PTH110
            return
        try:
            everything = files.read(f"{root}/cpuset.cpus").strip()
            for path in [*chain(root, directory), *([] if above_only else [directory])]:
                files.write(f"{path}/cpuset.cpus", everything)
        except OSError as e:
            raise CgroupError(f"cgroup {directory}: cpuset.cpus: {e.strerror}") from e

    def _memory_in_use(self) -> tuple[int, int]:
        usage = int(self.read("memory.usage_in_bytes") or 0)
        return usage, max(0, int(self.read("memory.memsw.usage_in_bytes") or usage) - usage)

    def stats(self) -> CgroupStats:
        from caisson.agent.libcontainer.cgroups.v1 import stats as v1_stats

        return v1_stats.read(self._directories, lambda: len(self.pids()))

    def oom_kills(self) -> int:
        from caisson.agent.libcontainer.cgroups.events import oom_kills
        from caisson.agent.libcontainer.cgroups.stats import CgroupDirectory

        return oom_kills(CgroupDirectory(self._directories.get("memory")), "memory.oom_control")

    def oom_watch(self, killed: Callable[[], object]) -> OomWatch | None:
        from caisson.agent.libcontainer.cgroups.events import EventFdNotifier, OomCounter

        directory = self._directories.get("memory")
        if directory is None or not os.path.exists(f"{directory}/memory.oom_control"):  # noqa: PTH110
            return None
        counter = OomCounter(self.oom_kills, killed)

        def check() -> bool:
            if "oom_kill_disable 1\nunder_oom 1" in (self.read("memory.oom_control") or ""):
                killed()  # as configured, nothing is killed, and all processes are blocked
                return True
            return counter.check()

        try:
            return EventFdNotifier(directory, check)
        except OSError as e:
            raise CgroupError(f"cgroup {directory}: memory.oom_control: {e.strerror}") from e

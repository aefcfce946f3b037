"""cgroup v2: a container's cgroup, its limits and its end.  https://docs.kernel.org/admin-guide/cgroup-v2.html

Writing a pid to cgroup.procs costs an RCU grace period (about 15 ms); processes are therefore born in their cgroup, by
the directory descriptor that `Cgroup.fd` is.
"""

from __future__ import annotations

import asyncio
import os

from caisson.agent.libcontainer.cgroups import files
from caisson.agent.libcontainer.cgroups.base import (
    DELETE_TRIES,
    FREEZE_SECONDS,
    Cgroup,
    CgroupError,
    Hierarchy,
    parts_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from caisson.agent.libcontainer.cgroups.base import Setting
    from caisson.agent.libcontainer.cgroups.events import FileWatch
    from caisson.agent.libcontainer.cgroups.stats import CgroupStats
    from caisson.agent.libcontainer.config.resources import DeviceRule, Resources


class CgroupV2(Hierarchy):
    """The cgroup v2 hierarchy of this machine."""

    def __init__(self, root: str, parent: str = "") -> None:
        self.root = root
        self._parent = parent
        self._made: set[str] = set()  # directories that go with the last cgroup in them

    @classmethod
    def find(cls, parent: str = "", mountinfo: str = "/proc/self/mountinfo") -> CgroupV2 | None:
        """Where cgroup2 is mounted; None if it is not.  On a hybrid host that is /sys/fs/cgroup/unified.

        All cgroups are made below the cgroup `parent`, which is made with the first and goes with the last.
        """
        with open(mountinfo, encoding="utf-8", errors="surrogateescape") as lines:  # noqa: PTH123 - no pathlib at start
            for line in lines:
                before, _, after = line.partition(" - ")
                if after.startswith("cgroup2 "):
                    return cls(before.split(" ")[4].encode().decode("unicode_escape"), parent)
        return None

    def create(self, path: str) -> CgroupOfV2:
        """Make the cgroup `path` (as in linux.cgroupsPath, below the parent) with all controllers that there are.

        Raises CgroupError, also if it is in use.
        """
        parts = parts_of(path)
        at = self.root
        made: list[str] = []
        try:
            for part in [*self._parent.split("/"), *parts] if self._parent else parts:
                _enable_controllers(at)
                at = f"{at}/{part}"
                try:
                    os.mkdir(at, 0o755)  # noqa: PTH102 - no pathlib at start
                    made.append(at)
                except FileExistsError:
                    pass
            cgroup = CgroupOfV2(at, self._made)
        except OSError as e:
            files.remove_all(made)
            raise CgroupError(f"cgroup {path}: {e.strerror}") from e
        if cgroup.pids():
            cgroup.close()
            raise CgroupError(f"cgroup {path}: has processes in it already")
        self._made.update(made)
        return cgroup


class CgroupOfV2(Cgroup):
    """One cgroup.  `fd` is its directory, for clone3(CLONE_INTO_CGROUP).

    `made` are directories around it that were made for it and its like: they go with the last.
    """

    def __init__(self, path: str, made: set[str]) -> None:
        super().__init__()
        self.path = path
        self._made = made
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._device_program = -1
        self._changes: FileWatch | None = None

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
        """SIGKILL to everything in it, at once and without a race (Linux 5.14).  Raises CgroupError."""
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
        """Whether all of it stands still."""
        return "frozen 1" in (self.read("cgroup.events") or "").splitlines()

    async def _freezer(self, value: str) -> None:
        from caisson.agent.libcontainer.cgroups.events import FileWatch

        changed = asyncio.Event()
        try:
            changes = FileWatch(self.file("cgroup.events"), changed.set)
            try:
                files.write(self.file("cgroup.freeze"), value)
                async with asyncio.timeout(FREEZE_SECONDS):
                    while self.frozen != (value == "1"):
                        await changed.wait()
                        changed.clear()
            except TimeoutError:
                files.write(self.file("cgroup.freeze"), "0")
                raise CgroupError(f"cgroup {self.path}: did not freeze within {FREEZE_SECONDS:g} s") from None
            finally:
                changes.close()
        except OSError as e:
            raise CgroupError(f"cgroup {self.path}: freezer: {e.strerror}") from e

    async def delete(self) -> None:
        pause = 0.001
        for attempt in range(DELETE_TRIES):
            try:
                if files.remove_tree(self.path):
                    break
            except OSError as e:
                raise CgroupError(f"cgroup {self.path}: cannot be removed: {e.strerror}") from e
            if attempt == DELETE_TRIES - 1:
                raise CgroupError(f"cgroup {self.path}: cannot be removed: there are processes in it")
            await asyncio.sleep(pause)
            pause *= 2
        self.close()
        self._made.discard(self.path)
        files.remove_around(self.path, self._made)

    def stats(self) -> CgroupStats:
        from caisson.agent.libcontainer.cgroups.v2 import stats as v2_stats

        return v2_stats.read(self.path, lambda: len(self.pids()))

    def oom_kills(self) -> int:
        from caisson.agent.libcontainer.cgroups.events import kills
        from caisson.agent.libcontainer.cgroups.stats import Directory

        return kills(Directory(self.path), "memory.events")

    def watch_oom(self, killed: Callable[[], object]) -> None:
        from caisson.agent.libcontainer.cgroups.events import FileWatch, OomCounter

        try:
            self._changes = FileWatch(self.file("memory.events"), OomCounter(self.oom_kills, killed).look)
        except FileNotFoundError:
            return
        except OSError as e:
            raise CgroupError(f"cgroup {self.path}: memory.events: {e.strerror}") from e

    def close(self) -> None:
        if self._changes is not None:
            self._changes.close()
            self._changes = None
        for fd in (self.fd, self._device_program):
            if fd >= 0:
                os.close(fd)
        self.fd = self._device_program = -1

    def allow_devices(self, rules: tuple[DeviceRule, ...]) -> None:
        """One program takes the place of the other: there is no moment without rules."""
        from caisson.agent.libcontainer.cgroups import device_program as devices

        try:
            program = devices.attach(self.fd, rules, self._device_program)
        except OSError as e:
            raise CgroupError(f"linux.resources.devices: eBPF device program: {e.strerror}") from e
        if self._device_program >= 0:
            os.close(self._device_program)
        self._device_program = program

    def _memory_in_use(self) -> tuple[int, int]:
        return int(self.read("memory.current") or 0), int(self.read("memory.swap.current") or 0)


def _enable_controllers(path: str) -> None:
    """Offer all controllers of `path` to its children; what cannot be offered shows when a limit is set."""
    available = set(files.read(f"{path}/cgroup.controllers").split())
    for controller in available - set(files.read(f"{path}/cgroup.subtree_control").split()):
        try:
            files.write(f"{path}/cgroup.subtree_control", f"+{controller}")
        except OSError:
            continue

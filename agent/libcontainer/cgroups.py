"""cgroup v2: a container's cgroup, its limits and its end.  https://docs.kernel.org/admin-guide/cgroup-v2.html

Writing a pid to cgroup.procs costs an RCU grace period (about 15 ms); processes are therefore born in their cgroup, by
the directory descriptor that `Cgroup.fd` is.
"""

from __future__ import annotations

import asyncio
import os
from errno import EBUSY

from agent.libcontainer import devices

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.libcontainer.resources import CpuLimits, MemoryLimits, Resources

DELETE_TRIES = 10
FREEZE_SECONDS = 10.0
DEFAULT_PERIOD = 100_000  # microseconds, the kernel's


class CgroupError(Exception):
    """A cgroup that could not be made, limited or removed; str() is the sentence for the user."""


class CgroupV2:
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

    def create(self, path: str) -> Cgroup:
        """Make the cgroup `path` (as in linux.cgroupsPath, below the parent) with all controllers that there are.

        Raises CgroupError, also if it is in use.
        """
        parts = [part for part in path.split("/") if part]
        if not parts or any(part in (".", "..") or "\0" in part or "\n" in part or len(part) > 255 for part in parts):
            raise CgroupError(f"cgroup path {path!r} is not one")
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
            cgroup = Cgroup(at, self._made)
        except OSError as e:
            _remove_all(made)
            raise CgroupError(f"cgroup {path}: {e.strerror}") from e
        if cgroup.pids():
            cgroup.close()
            raise CgroupError(f"cgroup {path}: has processes in it already")
        self._made.update(made)
        return cgroup


class Cgroup:
    """One cgroup.  `fd` is its directory, for clone3(CLONE_INTO_CGROUP).

    `made` are directories around it that were made for it and its like: they go with the last.
    """

    def __init__(self, path: str, made: set[str]) -> None:
        self.path = path
        self._made = made
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._device_program = -1

    def pids(self) -> list[int]:
        """All processes in it and below, none if it is gone."""
        found: list[int] = []
        for path in _tree(self.path):
            try:
                found += [int(pid) for pid in _read(f"{path}/cgroup.procs").split()]
            except OSError:  # just removed, or threaded
                continue
        return found

    def kill(self) -> None:
        """SIGKILL to everything in it, at once and without a race (Linux 5.14).  Raises CgroupError."""
        try:
            self._write("cgroup.kill", "1")
        except FileNotFoundError:
            return
        except OSError as e:
            raise CgroupError(f"cgroup {self.path}: kill: {e.strerror}") from e

    async def freeze(self) -> None:
        """Stop everything in it; returns once it stands still.  Raises CgroupError."""
        await self._freezer("1")

    async def thaw(self) -> None:
        """Let it go on.  Raises CgroupError."""
        await self._freezer("0")

    @property
    def frozen(self) -> bool:
        """Whether all of it stands still."""
        try:
            return "frozen 1" in _read(f"{self.path}/cgroup.events").splitlines()
        except OSError:
            return False

    async def _freezer(self, value: str) -> None:
        try:
            self._write("cgroup.freeze", value)
        except OSError as e:
            raise CgroupError(f"cgroup {self.path}: freezer: {e.strerror}") from e
        try:
            async with asyncio.timeout(FREEZE_SECONDS):
                pause = 0.0005
                while self.frozen != (value == "1"):
                    await asyncio.sleep(pause)  # cgroup.events is readable all the time: epoll cannot wait for it
                    pause = min(pause * 2, 0.05)
        except TimeoutError:
            self._write("cgroup.freeze", "0")
            raise CgroupError(f"cgroup {self.path}: did not freeze within {FREEZE_SECONDS:g} s") from None

    async def delete(self) -> None:
        """Remove it and all below.  Retries while the kernel still tears down dead processes.  Raises CgroupError."""
        pause = 0.001
        for attempt in range(DELETE_TRIES):
            try:
                for path in sorted(_tree(self.path), key=len, reverse=True):
                    os.rmdir(path)  # noqa: PTH106 - no pathlib at start
                break
            except FileNotFoundError:
                continue
            except OSError as e:
                if e.errno != EBUSY or attempt == DELETE_TRIES - 1:
                    raise CgroupError(f"cgroup {self.path}: cannot be removed: {e.strerror}") from e
            await asyncio.sleep(pause)
            pause *= 2
        self.close()
        self._made.discard(self.path)
        around = os.path.dirname(self.path)  # noqa: PTH120 - no pathlib at start
        while around in self._made:
            try:
                os.rmdir(around)  # noqa: PTH106 - no pathlib at start
            except OSError:  # another is in it
                return
            self._made.discard(around)
            around = os.path.dirname(around)  # noqa: PTH120 - no pathlib at start

    def close(self) -> None:
        """Close descriptors; the cgroup stays.  Idempotent."""
        for fd in (self.fd, self._device_program):
            if fd >= 0:
                os.close(fd)
        self.fd = self._device_program = -1

    def apply(self, resources: Resources) -> None:
        """Set limits and device rules.  Raises CgroupError naming what this machine cannot do."""
        for field, file, value in settings(resources):
            try:
                self._write(file, value)
            except FileNotFoundError:
                controller = file.partition(".")[0]
                raise CgroupError(f"{field}: the cgroup controller {controller!r} is not available here") from None
            except OSError as e:
                raise CgroupError(f"{field}: {file} = {value!r}: {e.strerror}") from e
        try:
            program = devices.attach(self.fd, resources.devices, self._device_program)
        except OSError as e:
            raise CgroupError(f"linux.resources.devices: eBPF device program: {e.strerror}") from e
        if self._device_program >= 0:
            os.close(self._device_program)
        self._device_program = program

    def _write(self, file: str, value: str) -> None:
        fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self.fd)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)


def settings(resources: Resources) -> Iterator[tuple[str, str, str]]:
    """The limits as (field of the configuration, file, value), in an order in which the kernel takes them."""
    where = "linux.resources"
    if resources.memory is not None:
        yield from _memory(resources.memory, f"{where}.memory")
    if resources.cpu is not None:
        yield from _cpu(resources.cpu, f"{where}.cpu")
    if resources.pids_limit:
        yield f"{where}.pids.limit", "pids.max", "max" if resources.pids_limit < 0 else str(resources.pids_limit)
    for file, value in (resources.unified or {}).items():
        if "/" in file or file in ("", ".", "..") or file.startswith("cgroup."):
            raise CgroupError(f"{where}.unified: {file!r} is not a limit")
        for line in value.splitlines():
            yield f"{where}.unified[{file}]", file, line


def _memory(memory: MemoryLimits, where: str) -> Iterator[tuple[str, str, str]]:
    if memory.swap:
        if memory.swap < 0:
            swap = "max"
        elif not memory.limit or memory.limit < 0 or memory.swap < memory.limit:
            raise CgroupError(f"{where}.swap: is memory plus swap, and needs a limit that is not above it")
        else:
            swap = str(memory.swap - memory.limit)
        yield f"{where}.swap", "memory.swap.max", swap
    if memory.limit:
        yield f"{where}.limit", "memory.max", "max" if memory.limit < 0 else str(memory.limit)
    if memory.reservation:
        yield f"{where}.reservation", "memory.low", "max" if memory.reservation < 0 else str(memory.reservation)


def _cpu(cpu: CpuLimits, where: str) -> Iterator[tuple[str, str, str]]:
    if cpu.idle is not None and cpu.idle:
        yield f"{where}.idle", "cpu.idle", "1"
    if cpu.shares:
        yield f"{where}.shares", "cpu.weight", str(weight(cpu.shares))
    if cpu.quota or cpu.period:
        quota = str(cpu.quota) if cpu.quota and cpu.quota > 0 else "max"
        yield f"{where}.quota", "cpu.max", f"{quota} {cpu.period or DEFAULT_PERIOD}"
    if cpu.burst:
        yield f"{where}.burst", "cpu.max.burst", str(cpu.burst)
    if cpu.cpus:
        yield f"{where}.cpus", "cpuset.cpus", cpu.cpus
    if cpu.mems:
        yield f"{where}.mems", "cpuset.mems", cpu.mems


def weight(shares: int) -> int:
    """cgroup v1 shares (2-262144, 1024 the default) as v2 weight (1-10000, 100 the default), as runc since 1.3."""
    from math import log2

    if shares <= 2:
        return 1
    if shares >= 262144:
        return 10000
    scale = log2(shares)
    return round(10 ** ((scale * scale + 125 * scale) / 612 - 7 / 34))


def _enable_controllers(path: str) -> None:
    """Offer all controllers of `path` to its children; what cannot be offered shows when a limit is set."""
    available = set(_read(f"{path}/cgroup.controllers").split())
    for controller in available - set(_read(f"{path}/cgroup.subtree_control").split()):
        try:
            with open(f"{path}/cgroup.subtree_control", "w", encoding="ascii") as file:  # noqa: PTH123
                file.write(f"+{controller}")
        except OSError:
            continue


def _tree(path: str) -> list[str]:
    """The cgroup and all below it."""
    return [directory for directory, _, _ in os.walk(path)]


def _remove_all(made: list[str]) -> None:
    for path in reversed(made):
        try:
            os.rmdir(path)  # noqa: PTH106 - no pathlib at start
        except OSError:
            return


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:  # noqa: PTH123 - no pathlib at start
        return file.read()

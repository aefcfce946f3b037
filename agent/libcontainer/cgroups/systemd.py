"""cgroups managed by systemd: a transient scope per container, on a host with cgroup v2.

systemd then owns the tree, and removes a scope once it is empty; it is called over D-Bus through its own programs,
systemd-run(1) and systemctl(1).  Limits are written to the cgroup's files, as without systemd, and also set as
properties of the unit: otherwise `systemctl daemon-reload` would reset them.
"""

from __future__ import annotations

import os
import subprocess

from caisson.agent.libcontainer.cgroups.base import Cgroup, CgroupError, Hierarchy, JoinFds
from caisson.agent.libcontainer.cgroups.v2.cgroup import CgroupV2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from caisson.agent.libcontainer.cgroups.base import Setting
    from caisson.agent.libcontainer.config.resources import Resources

RUNNING = "/run/systemd/system"  # sd_booted(3)
SLICES, USER_SLICES = "system.slice", "user.slice"
PREFIX = "runc"
UNIT_MAX = 255
UNIT_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:-_.\\@")
TIMEOUT = 60  # timeout of a systemd job, in seconds
HOLDER = ("cat",)  # keeps a scope alive until the first process joins
#: Properties of a unit (systemd.resource-control(5)) by the file that they are written to.
PROPERTIES = {
    "memory.max": "MemoryMax", "memory.low": "MemoryLow", "memory.min": "MemoryMin", "memory.high": "MemoryHigh",
    "memory.swap.max": "MemorySwapMax", "cpu.weight": "CPUWeight", "pids.max": "TasksMax", "io.weight": "IOWeight",
    "cpuset.cpus": "AllowedCPUs", "cpuset.mems": "AllowedMemoryNodes",
}  # fmt: skip


class Scope:
    """A unit: its `slice` in the tree, and its `name`."""

    def __init__(self, text: str) -> None:
        """Read linux.cgroupsPath, which is "slice:prefix:name".  Raises CgroupError."""
        parts = text.split(":")
        if len(parts) != 3 or not parts[2]:
            raise CgroupError(
                f'expected cgroupsPath to be of format "slice:prefix:name" for systemd cgroups, got "{text}"'
            )
        parent, prefix, name = parts
        self.slice = parent or (SLICES if os.geteuid() == 0 else USER_SLICES)
        self.name = f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
        for unit in (self.slice, self.name):
            if not UNIT_CHARACTERS.issuperset(unit) or len(unit) > UNIT_MAX or unit.startswith("."):
                raise CgroupError(f"systemd: {unit!r} is not a valid name of a unit")
        if not self.slice.endswith(".slice"):
            raise CgroupError(f"systemd: {self.slice!r} is not a slice; its name ends in .slice")

    @property
    def path(self) -> str:
        """Its cgroup, below its slices: "a-b.slice" is in "a.slice"."""
        steps = [step for step in self.slice.removesuffix(".slice").split("-") if step]
        slices = ["-".join(steps[: number + 1]) + ".slice" for number in range(len(steps))]
        return "/".join(["", *_manager_cgroup(), *slices, self.name])


def _manager_cgroup() -> list[str]:
    """Return the parent cgroup of a service manager: empty for the system's."""
    uid = os.geteuid()
    return [] if uid == 0 else ["user.slice", f"user-{uid}.slice", f"user@{uid}.service"]


class Systemd(Hierarchy):
    """cgroup v2 as delegated by systemd; a new scope also gets `properties` (systemd_properties.py)."""

    def __init__(self, below: Hierarchy, properties: Sequence[str] = ()) -> None:
        self._below = below
        self._properties = properties

    def place(self, path: str, *, below_own: bool = False) -> dict[str, str]:
        """Return the directory of a scope."""
        root = self._below.place("x")[""].removesuffix("/x")
        return {"": root + Scope(path).path}

    def create(self, path: str, *, below_own: bool = False) -> ScopeCgroup:
        """Start a scope, which lasts until a process has joined it and all its processes have exited.  Raises
        CgroupError.
        """
        scope = Scope(path)
        directory = self.place(path)[""]
        if os.path.exists(directory):  # noqa: PTH110 - no pathlib at start
            raise CgroupError(f"systemd: unit {scope.name} exists; delete what it belongs to first")
        holder = _start(scope, self._properties)
        cgroup = ScopeCgroup(directory, holder)
        if cgroup.fd < 0:
            cgroup.release()
            raise CgroupError(f"systemd: unit {scope.name} is not at {directory}")
        return cgroup

    def open(self, paths: Mapping[str, str]) -> ScopeCgroup:
        """Open the cgroup of a scope, which may be gone."""
        return ScopeCgroup(paths[""])


def start_command(scope: Scope, properties: Sequence[str] = ()) -> list[str]:
    """Return the command that starts a unit around a process that exits at the end of its input; the last value of a
    property wins.
    """
    return [
        "systemd-run", *_manager(), "--scope", "--quiet", "--collect", f"--unit={scope.name}", f"--slice={scope.slice}",
        "--description=container", "--property=Delegate=yes", "--property=DefaultDependencies=no",
        *(f"--property={kind}Accounting=yes" for kind in ("Memory", "CPU", "IO", "Tasks")),
        *(f"--property={assignment}" for assignment in properties), "--", *HOLDER,
    ]  # fmt: skip


def _start(scope: Scope, properties: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a unit, and wait until it is running.  Raises CgroupError."""
    command = start_command(scope, properties)
    try:
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        raise CgroupError(f"systemd: systemd-run: {(error.strerror or '').lower()}") from None
    assert holder.stdin is not None and holder.stdout is not None and holder.stderr is not None
    try:
        holder.stdin.write(b"\n")
        holder.stdin.flush()
        if holder.stdout.read(1):
            return holder
    except OSError:  # it has exited, and says why
        pass
    said = holder.stderr.read(4096).decode("utf-8", "replace").strip()
    holder.stdin.close()
    holder.wait(TIMEOUT)
    raise CgroupError(f"systemd: unit {scope.name}: {said or 'could not be started'}")


def _manager() -> list[str]:
    return [] if os.geteuid() == 0 else ["--user"]


def _systemctl(*words: str) -> str:
    """Call systemctl; returns the problem, "" for none."""
    command = ["systemctl", *_manager(), "--no-ask-password", *words]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip() or f"status {done.returncode}" if done.returncode else ""


class ScopeCgroup(CgroupV2):
    """The cgroup of a scope."""

    def __init__(self, path: str, holder: subprocess.Popen[bytes] | None = None) -> None:
        super().__init__(path, set())
        self._unit = os.path.basename(path)  # noqa: PTH119 - no pathlib at start
        self._holder = holder

    def join_fds(self) -> JoinFds:
        """Open the descriptors to join it, as for every cgroup; after the block the scope lasts as long as its
        processes.
        """
        return ScopeJoinFds(self)

    def release(self) -> None:
        """End the process that was holding the scope."""
        holder, self._holder = self._holder, None
        if holder is None:
            return
        for stream in (holder.stdin, holder.stdout, holder.stderr):
            if stream is not None:
                stream.close()
        holder.wait(TIMEOUT)

    def apply(self, resources: Resources, *, devices: bool = True) -> None:
        super().apply(resources, devices=devices)
        self._set_limits(resources)

    async def update(self, resources: Resources) -> None:
        await super().update(resources)
        self._set_limits(resources)

    def _set_limits(self, resources: Resources) -> None:
        """Tell systemd the limits.  Raises CgroupError."""
        words = list(properties(self.settings(resources)))
        if not words:
            return
        problem = _systemctl("set-property", "--runtime", self._unit, *words)
        if problem:
            raise CgroupError(f"systemd: unit {self._unit}: {problem}")

    async def delete(self) -> None:
        self.release()
        _systemctl("stop", self._unit)  # usually removed with its last process
        _systemctl("reset-failed", self._unit)
        await super().delete()


class ScopeJoinFds(JoinFds):
    """Descriptors of a scope's cgroup; once they are closed, only the container keeps it alive."""

    def __init__(self, cgroup: ScopeCgroup) -> None:
        super().__init__(cgroup.path, cgroup.fd, [])
        self._cgroup = cgroup

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)
        self._cgroup.release()


def properties(settings: Iterable[Setting]) -> list[str]:
    """Return limits as properties of a unit; those without a systemd property are left out."""
    found = {}
    for setting in settings:
        name, value = PROPERTIES.get(setting.file), setting.value
        if setting.file == "cpu.max":
            quota, _, period = value.partition(" ")
            period = period or "100000"
            found["CPUQuota"] = "" if quota == "max" else f"{int(quota) * 100 / int(period):.2f}%"
            found["CPUQuotaPeriodSec"] = f"{period}us"
        elif setting.file == "cpu.idle" and value == "1":
            found["CPUWeight"] = "idle"
        elif name is not None:
            found[name] = "infinity" if value == "max" else value.removeprefix("default ")
    return [f"{name}={value}" for name, value in found.items()]


def is_running() -> bool:
    """Return whether systemd is the service manager of this machine (sd_booted(3))."""
    return os.path.isdir(RUNNING)  # noqa: PTH112 - no pathlib at start


__all__ = ["Cgroup", "Scope", "ScopeCgroup", "Systemd", "is_running", "properties", "start_command"]

"""A pod's cgroup on the host: its shim, supervisor, device back ends and VMM are accounted where the client requested.

Memory is bounded by the VM's size, not here: the guest's kernel may use all of it, whatever its containers' limits.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from caisson.agent.libcontainer import cgroups
from caisson.agent.libcontainer.cgroups import CgroupError
from caisson.agent.libcontainer.cgroups.base import own_cgroups
from caisson.agent.libcontainer.config.resources import Resources
from caisson.agent.libcontainer.waits import complete

__all__ = ["CgroupError", "HostCgroup", "cgroupfs_path", "enter", "planned", "remove"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from caisson.agent.libcontainer.cgroups import Cgroup, Hierarchy

#: Limits of a container that also apply to its VM.
CPU_LIMITS = ("shares", "quota", "period", "cpus", "mems")


class HostCgroup:
    """The cgroup that this process and its new children are in, until it leaves."""

    def __init__(self, cgroup: Cgroup, hierarchy: Hierarchy, before: Mapping[str, str]) -> None:
        self._cgroup = cgroup
        self._hierarchy = hierarchy
        self._before = before

    @classmethod
    def join(cls, document: dict[str, Any], pids: Iterable[int] = ()) -> HostCgroup | None:
        """Create the cgroup named by linux.cgroupsPath, with the CPU limits, and join it; None if none is named.

        ``pids`` are other processes that also join it.  Raises CgroupError or SpecError.
        """
        linux = document.get("linux") or {}
        path = cgroupfs_path(str(linux.get("cgroupsPath") or ""))
        hierarchy = cgroups.of_host() if path else None
        if hierarchy is None:
            return None
        before = own_cgroups()
        cgroup = hierarchy.create(path)
        joined = cls(cgroup, hierarchy, before)
        try:
            cgroup.apply(_cpu_limits(linux.get("resources") or {}), devices=False)
            for directory in cgroup.paths.values():
                for pid in (0, *pids):
                    _enter(directory, pid)
        except BaseException:
            with contextlib.suppress(CgroupError):
                complete(joined.leave())
            raise
        return joined

    async def update(self, resources: dict[str, Any]) -> None:
        """Change its CPU limits.  Raises CgroupError or SpecError."""
        await self._cgroup.update(_cpu_limits(resources))

    async def leave(self) -> None:
        """Return to this process's original cgroup, and remove this one.  Raises CgroupError."""
        for name, directory in self._hierarchy.place("x").items():
            root = directory.removesuffix("/x")
            _enter(f"{root}{self._before.get(name, '/')}")
        await self._cgroup.delete()


def _cpu_limits(resources: dict[str, Any]) -> Resources:
    cpu = resources.get("cpu") or {}
    return Resources.from_json({"cpu": {name: cpu[name] for name in CPU_LIMITS if cpu.get(name)}})


def enter(path: str) -> None:
    """Make this process join an existing cgroup, in every hierarchy that has it.  Raises CgroupError."""
    hierarchy = cgroups.of_host()
    for directory in hierarchy.place(path).values() if hierarchy is not None else ():
        if os.path.isdir(directory):  # noqa: PTH112
            _enter(directory)


def planned(document: dict[str, Any]) -> dict[str, str]:
    """Return the directories by controllers that `HostCgroup.join` creates, for `remove`.  Raises CgroupError."""
    path = cgroupfs_path(str((document.get("linux") or {}).get("cgroupsPath") or ""))
    hierarchy = cgroups.of_host() if path else None
    return {} if hierarchy is None else hierarchy.place(path)


async def remove(paths: Mapping[str, str]) -> None:
    """Remove the cgroup with these directories, once all its processes have exited.  Raises CgroupError."""
    hierarchy = cgroups.of_host()
    if hierarchy is not None and paths:
        await hierarchy.open(paths).delete()


def cgroupfs_path(path: str) -> str:
    """Convert a path in systemd's form, SLICE:PREFIX:NAME, to one in the cgroup file system; return others unchanged.

    Each dash of a slice's name is a level: systemd.slice(5).
    """
    slice_, colon, rest = path.partition(":")
    prefix, _, name = rest.partition(":")
    if not colon:
        return path
    words = slice_.removesuffix(".slice").split("-")
    slices = [f"{'-'.join(words[: count + 1])}.slice" for count in range(len(words))] if words != [""] else []
    return "/".join((*slices, f"{prefix}-{name}.scope" if prefix else name))


def _enter(directory: str, pid: int = 0) -> None:
    try:
        with open(f"{directory}/cgroup.procs", "w") as file:  # noqa: PTH123
            file.write(str(pid))  # 0: this process
    except OSError as error:
        raise CgroupError(f"{directory}: cannot be joined: {(error.strerror or '').lower()}") from error

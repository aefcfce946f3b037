"""Intel RDT: a container's share of cache and memory bandwidth, as a group of resctrl.

Source: Documentation/filesystems/resctrl.rst; config-linux.md, "IntelRdt".
"""

from __future__ import annotations

import os

from caisson.agent.base.mountinfo import PATH, mounts
from caisson.agent.libcontainer.config.reader import Reader, SpecError
from caisson.agent.libcontainer.errors import LaunchError
from caisson.proto.record import Record

WHERE = "linux.intelRdt"
NOT_MOUNTED = "Intel RDT is not supported or enabled: no resctrl file system is mounted"
RESERVED = ("info", "mon_data", "mon_groups")


class IntelRdt(Record):
    """`linux.intelRdt`: an empty `clos_id` means the container's own group, named after it."""

    clos_id: str = ""
    schemata: tuple[str, ...] = ()
    monitoring: bool = False


def from_json(value: object, where: str = WHERE) -> IntelRdt:
    """Parse the object.  Raises SpecError, also on a machine without resctrl."""
    r = Reader(value, where)
    bandwidth = tuple(line for line in r.text("memBwSchema").splitlines() if line)
    cache = tuple(line for line in r.text("l3CacheSchema").splitlines() if line and not line.startswith("MB:"))
    for flag in ("enableCMT", "enableMBM"):
        r.flag(flag)  # no effect: the kernel monitors every group
    parsed = IntelRdt(r.text("closID"), (*cache, *bandwidth, *r.texts("schemata")), r.flag("enableMonitoring"))
    r.done()
    name = parsed.clos_id
    if name in (".", "..", *RESERVED) or "/" in name or "\n" in name:
        raise SpecError(f"{where}.closID", f"{name!r} cannot be the name of a group")
    if any("\n" in line for line in parsed.schemata):
        raise SpecError(f"{where}.schemata", "each is one line")
    if mounted() is None:
        raise SpecError(where, NOT_MOUNTED)
    return parsed


def mounted(mountinfo: str = PATH) -> str | None:
    """Return the mount point of resctrl; None if it is not mounted."""
    return next((point for point, fstype, *_ in mounts(mountinfo) if fstype == "resctrl"), None)


class ResctrlGroup:
    """The group of a container below the mount `root`."""

    def __init__(self, settings: IntelRdt, container_id: str, root: str | None = None) -> None:
        """Raises LaunchError without resctrl."""
        found = root or mounted()
        if found is None:
            raise LaunchError(f"{WHERE}: {NOT_MOUNTED}", step="intelRdt")
        self._settings = settings
        self.path = f"{found}/{settings.clos_id or container_id}"
        self._monitor = f"{self.path}/mon_groups/{container_id}" if settings.monitoring else ""

    def make(self) -> None:
        """Create it and write its schemata; a named group is used as it is.  Raises LaunchError."""
        named, schemata = bool(self._settings.clos_id), self._settings.schemata
        exists = os.path.isdir(self.path)  # noqa: PTH112 - no pathlib at start
        if named and not schemata and not exists:
            raise LaunchError(f"{WHERE}.closID: there is no group {self.path}, and no schema for one", step="intelRdt")
        try:
            if not exists:
                os.mkdir(self.path, 0o755)  # noqa: PTH102
            if schemata:
                self._set(schemata, compare=named and exists)
            if self._monitor:
                os.mkdir(self._monitor, 0o755)  # noqa: PTH102
        except OSError as error:
            raise self._error(error) from error

    def _set(self, schemata: tuple[str, ...], *, compare: bool) -> None:
        file = f"{self.path}/schemata"
        if compare:
            with open(file, encoding="utf-8") as found:  # noqa: PTH123
                there = {_plain(line) for line in found}
            if not {_plain(line) for line in schemata} <= there:
                raise LaunchError(f"{WHERE}: the group {self.path} has another schema", step="intelRdt")
            return
        with open(file, "w", encoding="utf-8") as out:  # noqa: PTH123
            out.write("".join(f"{line}\n" for line in schemata))

    def add(self, pid: int) -> None:
        """Move a process into it.  Raises LaunchError."""
        try:
            for path in filter(None, (self.path, self._monitor)):
                with open(f"{path}/tasks", "w", encoding="ascii") as tasks:  # noqa: PTH123
                    tasks.write(str(pid))
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> LaunchError:
        return LaunchError(f"{WHERE}: {error.filename or self.path}: {error.strerror}", step="intelRdt")

    def remove(self) -> None:
        """Remove the group, unless the configuration named it."""
        for path in (self._monitor, "" if self._settings.clos_id else self.path):
            try:
                if path:
                    os.rmdir(path)  # noqa: PTH106 - no pathlib at start
            except OSError:  # it was never created
                continue


def _plain(line: str) -> str:
    """Return a schema line without blanks around its words."""
    return "".join(line.split())

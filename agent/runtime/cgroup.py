"""The cgroup that an exec'd process joins: the container's, or one below it."""

from __future__ import annotations

import os

from caisson.agent.libcontainer.cgroups.files import open_around
from caisson.agent.runtime.errors import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from caisson.agent.libcontainer.container import Container

JOINING = "unable to start container process:"


class ExecCgroup:
    """Descriptors by which nsexec joins cgroups, for a `with` block.

    `wanted` are sub-cgroups: "[CONTROLLER[,CONTROLLER]:]PATH".
    """

    def __init__(self, container: Container, wanted: list[str]) -> None:
        """Raises CommandError."""
        self._container = container
        self._paths: dict[str, str] = dict(container.state.cgroup_paths)
        self._chosen = bool(wanted)
        self._fds: list[int] = []
        for text in wanted:
            self._choose(text)

    def _choose(self, text: str) -> None:
        controllers, colon, path = text.partition(":")
        if not colon:
            controllers, path = "", text
        is_v2 = set(self._paths) <= {""}
        if controllers and is_v2:
            raise CommandError("cgroup v2 has a single hierarchy; give --cgroup without a controller")
        names = controllers.split(",") if controllers else list(self._paths)
        if ".." in path.split("/"):
            raise CommandError(f"bad sub cgroup path: {path}")
        for name in names:
            key = name if name in self._paths else f"name={name}"
            if key not in self._paths:
                raise CommandError(f"unknown controller {name}")
            self._paths[key] = os.path.normpath(f"{self._container.state.cgroup_paths[key]}/{path}")

    def __enter__(self) -> Mapping[str, int]:
        if set(self._paths) == {""}:
            return {"_CAISSON_CGROUP": self._directory(self._paths[""])}
        found = {}
        files = dict.fromkeys(self._paths.values())
        for number, path in enumerate(sorted(files, key=lambda path: "/freezer/" in path)):
            at = self._directory(path) if path == self._paths.get("") else None
            found[f"_CAISSON_CGROUP_{number}"] = self._open(f"{path}/cgroup.procs", os.O_WRONLY, at)
        return found

    def _directory(self, path: str) -> int:
        """Open a v2 cgroup; if it accepts no processes, the one below it that the init process is in."""
        if not self._chosen and self._is_unusable(path):
            fd = open_around(path, self._container.state.init_process_pid)
            if fd >= 0:
                self._fds.append(fd)
                return fd
        return self._open(path, os.O_RDONLY | os.O_DIRECTORY)

    def _is_unusable(self, path: str) -> bool:
        """Return whether no process can join: it is gone, or delegates controllers to its children (EBUSY)."""
        try:
            with open(f"{path}/cgroup.subtree_control", encoding="utf-8") as file:  # noqa: PTH123
                return bool(file.read().strip())
        except OSError:
            return True

    def _open(self, path: str, flags: int, directory: int | None = None) -> int:
        """Open a file, or the one of its name in `directory`; it is closed with the block."""
        name = path if directory is None else path.rpartition("/")[2]
        try:
            fd = os.open(name, flags | os.O_CLOEXEC, dir_fd=directory)
        except OSError as error:
            pid = os.getpid()
            why = (error.strerror or "").lower()
            raise CommandError(f"{JOINING} error adding pid {pid} to cgroups: open {path}: {why}") from None
        self._fds.append(fd)
        return fd

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

"""state.json: what is known of a container, at `<state root>/<sandbox>/<container>/state.json`.

The keys are those of runc's BaseState (libcontainer, `container_linux.go`); the configuration stays with its owner.
"""

from __future__ import annotations

import json
import os

from caisson.agent.base.record import NOTHING, Record
from caisson.agent.libcontainer.config.reader import Reader, SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FILE = "state.json"
ID_MAX = 255
ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+.-")
NAMESPACE_FILES = {
    "NEWNS": "mnt", "NEWUTS": "uts", "NEWIPC": "ipc", "NEWUSER": "user", "NEWPID": "pid", "NEWNET": "net",
    "NEWCGROUP": "cgroup", "NEWTIME": "time",
}  # fmt: skip


def check_id(name: str) -> str:
    """`name` if it can be a container's or sandbox's id: it becomes a directory and a cgroup.  Raises SpecError."""
    if not name or len(name) > ID_MAX or name in (".", "..") or not ID_CHARACTERS.issuperset(name):
        raise SpecError("id", f"{name[:64]!r} is not of 1 to {ID_MAX} letters, digits and _+.-")
    return name


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot: tells it from a later one with its pid.  0 if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - no pathlib at start
            return int(file.read().rpartition(b")")[2].split()[19])
    except OSError:
        return 0


class State(Record):
    """One container.  `created` is RFC 3339 in UTC; `cgroup_paths` is by controller, that of cgroup v2 by ""."""

    id: str
    init_process_pid: int
    init_process_start: int
    created: str
    cgroup_paths: Mapping[str, str] = NOTHING
    labels: Mapping[str, str] = NOTHING

    def to_json(self) -> dict[str, object]:
        """The document."""
        pid = self.init_process_pid
        return {
            "id": self.id,
            "init_process_pid": pid,
            "init_process_start": self.init_process_start,
            "created": self.created,
            "cgroup_paths": dict(self.cgroup_paths),
            "namespace_paths": {key: f"/proc/{pid}/ns/{file}" for key, file in NAMESPACE_FILES.items()},
            "external_descriptors": [],
            "config": {"labels": [f"{key}={value}" for key, value in self.labels.items()]},
        }

    def save(self, directory: Path) -> None:
        """Write state.json, whole or not at all.  Raises OSError."""
        temporary = directory / f"{FILE}.new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
            json.dump(self.to_json(), file)
        temporary.replace(directory / FILE)

    @classmethod
    def load(cls, directory: Path) -> State:
        """Read it back.  Raises OSError, or SpecError for what is not a state."""
        try:
            value = json.loads((directory / FILE).read_text(encoding="utf-8"))
        except ValueError as e:
            raise SpecError(str(directory / FILE), "is not JSON") from e
        r = Reader(value, FILE)
        labels = Reader(r.raw("config") or {}, f"{FILE}.config").texts("labels")
        return cls(
            id=check_id(r.text("id")),
            init_process_pid=r.number("init_process_pid", -1, 1 << 22) or 0,
            init_process_start=r.number("init_process_start", 0, 1 << 63) or 0,
            created=r.text("created"),
            cgroup_paths=r.table("cgroup_paths"),
            labels=dict(label.partition("=")[::2] for label in labels),
        )

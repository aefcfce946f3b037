"""state.json: the saved state of a container, at `<root>/<id>/state.json`.

The keys are those of runc's BaseState (libcontainer, `container_linux.go`) where it has them.
"""

from __future__ import annotations

import os
import time

from caisson.agent.base.json import JsonError, dumps, loads
from caisson.agent.libcontainer import faults
from caisson.agent.libcontainer.config.reader import Reader, SpecError
from caisson.proto.record import NOTHING, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

FILE = "state.json"
#: The version of the runtime specification that states comply with ("State"), whatever a configuration names.
OCI_VERSION = "1.3.0"
#: A container's status (runtime.md, "State"; paused is runc's).
CREATED, RUNNING, PAUSED, STOPPED = "created", "running", "paused", "stopped"
ID_MAX = 255
ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+.-")
NAMESPACE_FILES = {
    "NEWNS": "mnt", "NEWUTS": "uts", "NEWIPC": "ipc", "NEWUSER": "user", "NEWPID": "pid", "NEWNET": "net",
    "NEWCGROUP": "cgroup", "NEWTIME": "time",
}  # fmt: skip

PF_FORKNOEXEC = 0x40  # include/linux/sched.h: forked, and nothing executed since
START_TIME, FLAGS = 19, 6  # fields after the name, from 0


def check_id(name: str) -> str:
    """Return `name` if it is a valid id: it becomes a directory and a cgroup.  Raises SpecError."""
    if not name or len(name) > ID_MAX or name in (".", "..") or not ID_CHARACTERS.issuperset(name):
        raise SpecError("id", f"{name[:64]!r} is not of 1 to {ID_MAX} letters, digits and _+.-")
    return name


def now() -> str:
    """Return the current time in RFC 3339 with nanoseconds, in UTC."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds:09d}Z"


class State(Record):
    """One container.

    `created` is RFC 3339 in UTC; `cgroup_paths` is by controller, that of cgroup v2 by "".  `joined` are namespaces
    that its init process joined beyond its configuration, as paths by type; `resources` are its current limits, as in
    the configuration.  A pid of -1 means that it is being created.  With `systemd` its cgroup is a scope's.
    """

    id: str
    init_process_pid: int
    init_process_start: int
    created: str
    cgroup_paths: Mapping[str, str] = NOTHING
    labels: Mapping[str, str] = NOTHING
    bundle: str = ""
    rootfs: str = ""
    joined: Mapping[str, str] = NOTHING
    resources: Mapping[str, object] = NOTHING
    rootless: bool = False
    systemd: bool = False

    def to_json(self) -> dict[str, object]:
        """Return the document."""
        pid = self.init_process_pid
        labels = [f"{key}={value}" for key, value in self.labels.items()]
        return {
            "id": self.id,
            "init_process_pid": pid,
            "init_process_start": self.init_process_start,
            "created": self.created,
            "rootless": self.rootless,
            "systemd": self.systemd,
            "cgroup_paths": dict(self.cgroup_paths),
            "namespace_paths": {key: f"/proc/{pid}/ns/{file}" for key, file in NAMESPACE_FILES.items()},
            "external_descriptors": [],
            "config": {
                "version": OCI_VERSION,
                "rootfs": self.rootfs,
                "labels": [*labels, *([f"bundle={self.bundle}"] if self.bundle else [])],
            },
            "joined_namespaces": dict(self.joined),
            "resources": dict(self.resources),
        }

    def save(self, directory: str) -> None:
        """Write state.json atomically.  Raises OSError."""
        write_whole(f"{directory}/{FILE}", dumps(self.to_json()))

    @classmethod
    def load(cls, directory: str) -> State:
        """Read it back.  Raises OSError, or SpecError if it is invalid."""
        value = read_json(f"{directory}/{FILE}")
        r = Reader(value, FILE)
        config = Reader(r.raw("config") or {}, f"{FILE}.config")
        labels = dict(label.partition("=")[::2] for label in config.texts("labels"))
        resources = r.raw("resources")
        return cls(
            id=check_id(r.text("id")),
            init_process_pid=r.number("init_process_pid", -1, 1 << 22) or 0,
            init_process_start=r.number("init_process_start", 0, 1 << 63) or 0,
            created=r.text("created"),
            cgroup_paths=r.table("cgroup_paths"),
            bundle=labels.pop("bundle", ""),
            labels=labels,
            rootfs=config.text("rootfs"),
            joined=r.table("joined_namespaces"),
            resources=resources if isinstance(resources, dict) else {},
            rootless=r.flag("rootless"),
            systemd=r.flag("systemd"),
        )


def read_json(path: str) -> object:
    """Decode a file.  Raises OSError, or SpecError if it is not JSON."""
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - no pathlib at start
            return loads(file.read())
    except (JsonError, UnicodeDecodeError) as error:
        raise SpecError(path, f"is not JSON: {error}") from None


def write_whole(path: str, content: str | bytes) -> None:
    """Write a file atomically, readable only by its owner.  Raises OSError."""
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor
        file.write(content.encode() if isinstance(content, str) else content)
    faults.reach("state_written")
    os.replace(temporary, path)  # noqa: PTH105 - no pathlib at start


class ProcessStat(Record):
    """A process's state at one moment.

    `start_time` (clock ticks since boot) distinguishes it from a later one with its pid; `state` is R, S, … Z for a
    zombie; `executed` is whether it has executed a program since it was forked.
    """

    start_time: int
    state: str
    executed: bool

    @classmethod
    def read(cls, pid: int) -> ProcessStat | None:
        """Read a process's state; None if there is none, or only another user's (hidepid, proc(5)).  Raises OSError."""
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - a procfs file
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return None
        return cls(int(fields[START_TIME]), fields[0].decode(), not int(fields[FLAGS]) & PF_FORKNOEXEC)

    @property
    def alive(self) -> bool:
        """Whether it is alive: not a zombie."""
        return self.state not in ("Z", "X")

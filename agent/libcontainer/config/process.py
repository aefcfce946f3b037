"""`process` of the OCI configuration, and of the document for `exec`: the program, its user and its privileges.

Source: the OCI runtime specification, config.md, "Process".
"""

from __future__ import annotations

from caisson.agent.libcontainer.config import scheduling
from caisson.agent.libcontainer.config.reader import U32_MAX, U64_MAX, Reader, SpecError
from caisson.agent.libcontainer.plan import lsm as labels
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.libcontainer.config.scheduling import Affinity


class User(Record):
    """`process.user`: ids inside the container, or a name that stands for them (users.py).

    `umask` None leaves the default (022 for an init).
    """

    uid: int = 0
    gid: int = 0
    additional_gids: tuple[int, ...] = ()
    umask: int | None = None
    username: str = ""


class Capabilities(Record):
    """`process.capabilities`: the five sets by name ("CAP_KILL"), exactly as the process gets them."""

    bounding: tuple[str, ...] = ()
    effective: tuple[str, ...] = ()
    inheritable: tuple[str, ...] = ()
    permitted: tuple[str, ...] = ()
    ambient: tuple[str, ...] = ()


class Rlimit(Record):
    """One of `process.rlimits`; U64_MAX is unlimited (setrlimit(2))."""

    type: str
    soft: int
    hard: int


class Process(Record):
    """`process`: the program, its user and its privileges.  None means "not given"."""

    args: tuple[str, ...]
    cwd: str = "/"
    env: tuple[str, ...] = ()
    terminal: bool = False
    console_size: tuple[int, int] | None = None  # rows, columns
    user: User = User()
    capabilities: Capabilities | None = None
    rlimits: tuple[Rlimit, ...] = ()
    no_new_privileges: bool = False
    oom_score_adj: int | None = None
    scheduler: bytes | None = None  # struct sched_attr
    io_priority: int | None = None
    exec_cpu_affinity: Affinity | None = None  # of a process that joins a container
    apparmor_profile: str = ""
    selinux_label: str = ""

    @classmethod
    def from_json(cls, value: object, where: str = "process") -> Process:
        """Parse an OCI process object.  Raises SpecError."""
        r = Reader(value, where)
        args = r.texts("args")
        if not args:
            raise SpecError(r.name("args"), "must name a program to run")
        r.unknown("commandLine", "is for Windows; give args")
        result = cls(
            args=args,
            cwd=r.text("cwd") or "/",
            env=r.texts("env"),
            terminal=r.flag("terminal"),
            console_size=r.one("consoleSize", _console_size),
            user=r.one("user", _user) or User(),
            capabilities=r.one("capabilities", _capabilities),
            rlimits=r.each("rlimits", _rlimit),
            no_new_privileges=r.flag("noNewPrivileges"),
            oom_score_adj=r.number("oomScoreAdj", -1000, 1000),
            scheduler=r.one("scheduler", scheduling.scheduler),
            io_priority=r.one("ioPriority", scheduling.io_priority),
            exec_cpu_affinity=r.one("execCPUAffinity", scheduling.affinity),
            apparmor_profile=r.text("apparmorProfile"),
            selinux_label=r.text("selinuxLabel"),
        )
        r.done()
        if not result.cwd.startswith("/"):
            raise SpecError(r.name("cwd"), f"must be an absolute path, not {result.cwd!r}")
        if len({limit.type for limit in result.rlimits}) != len(result.rlimits):
            raise SpecError(r.name("rlimits"), "names a limit twice")
        if result.apparmor_profile and not labels.has_apparmor():
            raise SpecError(r.name("apparmorProfile"), "this kernel has no AppArmor")
        if result.selinux_label and not labels.has_selinux():
            raise SpecError(r.name("selinuxLabel"), "this kernel has no SELinux")
        return result


def _user(value: object, where: str) -> User:
    r = Reader(value, where)
    user = User(
        uid=r.number("uid", 0, U32_MAX - 1) or 0,
        gid=r.number("gid", 0, U32_MAX - 1) or 0,
        additional_gids=tuple(dict.fromkeys(r.numbers("additionalGids", 0, U32_MAX - 1))),
        umask=r.number("umask", 0, 0o777),
        username=r.text("username"),
    )
    r.done()
    return user


def _capabilities(value: object, where: str) -> Capabilities:
    r = Reader(value, where)
    sets = [r.texts(name) for name in ("bounding", "effective", "inheritable", "permitted", "ambient")]
    r.done()
    return Capabilities(*sets)


def _rlimit(value: object, where: str) -> Rlimit:
    r = Reader(value, where)
    soft, hard = (r.number(key, 0, U64_MAX) or 0 for key in ("soft", "hard"))
    limit = Rlimit(r.text("type"), soft, hard)
    r.done()
    if limit.soft > limit.hard:
        raise SpecError(where, f"the soft limit {limit.soft} is above the hard limit {limit.hard}")
    return limit


def _console_size(value: object, where: str) -> tuple[int, int]:
    r = Reader(value, where)
    size = (r.number("height", 0, 0xFFFF) or 0, r.number("width", 0, 0xFFFF) or 0)
    r.done()
    return size

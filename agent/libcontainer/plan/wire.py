"""Encode the messages for nsexec: netlink-framed (struct nlmsghdr, struct nlattr), native byte order.

The bootstrap message and its attribute numbers are those of runc (libcontainer/message_linux.go); see nsexec's plan.c.
"""

from __future__ import annotations

from struct import pack

from caisson.agent.base import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from caisson.agent.libcontainer.config.spec import IdMapping, TimeOffset

MESSAGE_BOOTSTRAP = 62000
MESSAGE_PLAN = 62001
MESSAGE_STRINGS = 62002

# Attributes of the bootstrap message
CLONE_FLAGS = 27281
NS_PATHS = 27282
UID_MAP = 27283
GID_MAP = 27284
SETGROUPS = 27285
OOM_SCORE_ADJ = 27286
UID_MAP_PATH = 27288
GID_MAP_PATH = 27289
TIME_OFFSETS = 27290
JOIN_MASK = 27350  # ours: what to join from the pidfd
KEEP_KEYRING = 27351  # ours: no session keyring of its own

# clone(2); OCI name -> (flag, name of the file in /proc/PID/ns)
NAMESPACES: dict[str, tuple[int, str]] = {
    "user": (syscalls.CLONE_NEWUSER, "user"),
    "ipc": (syscalls.CLONE_NEWIPC, "ipc"),
    "uts": (syscalls.CLONE_NEWUTS, "uts"),
    "network": (syscalls.CLONE_NEWNET, "net"),
    "pid": (syscalls.CLONE_NEWPID, "pid"),
    "mount": (syscalls.CLONE_NEWNS, "mnt"),
    "cgroup": (syscalls.CLONE_NEWCGROUP, "cgroup"),
    "time": (syscalls.CLONE_NEWTIME, "time"),
}

MESSAGE_LIMITS = {MESSAGE_BOOTSTRAP: 1 << 20, MESSAGE_PLAN: 1 << 20, MESSAGE_STRINGS: (2 << 20) - 4096}


# Steps of a plan, in the order of execution (nsexec.h)
VERSION = 1
(
    PLAN_VERSION, PROPAGATION, ROOTFS, MOUNT, DEVICE, SYMLINK, HOOK_STATE, RUNTIME_HOOKS, NETLINK,
    CREATE_HOOK, PIVOT, ROOT_PROPAGATION, CONSOLE, REMOUNT, ROOT_READONLY, HOSTNAME, DOMAINNAME, SYSCTL, READONLY, MASK,
    UMASK, RLIMIT, CPUS, FINAL_CPUS, SCHEDULER, IO_PRIORITY, PERSONALITY, MEMORY_POLICY, LABEL, NO_NEW_PRIVS, SECCOMP,
    GROUPS, USER, CAPABILITIES, CWD, START_HOOK, STRINGS,
) = range(27400, 27437)  # fmt: skip

(
    MOUNT_BIND, MOUNT_RECURSIVE, MOUNT_ORDINARY_DIR, MOUNT_OVER_PROC_FILE, MOUNT_COPY_UP, MOUNT_IDMAP,
    MOUNT_IDMAP_RECURSIVE, MOUNT_REMOUNT, MOUNT_IN_CHILD,
) = (1 << bit for bit in range(9))  # fmt: skip

PIVOT_ROOT, PIVOT_MOVE, PIVOT_CHROOT = 0, 1, 2  # pivot_root(2); MS_MOVE and chroot(2); chroot(2) alone


class EncodingError(Exception):
    """`what` is too large for the message."""

    def __init__(self, what: str, size: int, limit: int) -> None:
        super().__init__(f"{what} takes {size} bytes, and at most {limit} can be passed")


def attribute(kind: int, payload: bytes, what: str = "attribute") -> bytes:
    """Encode a struct nlattr, padded.  The length is 16 bits: overlong values are rejected, never wrapped
    (CVE-2021-43784).
    """
    size = 4 + len(payload)
    if size > 0xFFFF:
        raise EncodingError(what, len(payload), 0xFFFF - 4)
    return pack("=HH", size, kind) + payload + bytes(-size % 4)


def text(kind: int, value: str | bytes, what: str = "attribute") -> bytes:
    """Encode a NUL-terminated string; the NUL counts."""
    return attribute(kind, encode(value) + b"\0", what)


def number(kind: int, value: int) -> bytes:
    """Encode a u32."""
    return attribute(kind, pack("=I", value))


def truth(kind: int, value: bool) -> bytes:
    """Encode a boolean: one byte and three of padding that count as payload."""
    return attribute(kind, pack("=B3x", value))


def encode(value: str | bytes) -> bytes:
    """Encode text as file names and execve arguments are encoded."""
    return value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")


def texts(*values: str) -> bytes:
    """Encode strings one after the other, each NUL-terminated."""
    return encode("\0".join((*values, "")))


def message(kind: int, body: bytes, what: str) -> bytes:
    """Encode a whole message with its header; raises EncodingError if it is too large for nsexec."""
    size = 16 + len(body)
    if size > MESSAGE_LIMITS[kind]:
        raise EncodingError(what, size, MESSAGE_LIMITS[kind])
    return pack("=IHHII", size, kind, 1, 1, 0) + body


def strings(values: Iterable[str]) -> bytes:
    """Encode argv, then envp, each string NUL-terminated; the message is not padded; nsexec reads exactly its
    length.
    """
    return message(MESSAGE_STRINGS, texts(*values), "args and env")


def bootstrap(
    *,
    create: int = 0,
    join: int = 0,
    paths: Iterable[tuple[str, str]] = (),
    uid_map: Iterable[IdMapping] = (),
    gid_map: Iterable[IdMapping] = (),
    oom_score_adj: int | None = None,
    time_offsets: Mapping[str, TimeOffset] | None = None,
    map_programs: tuple[str, str] | None = None,
    setgroups: bool = True,
    keyring: bool = True,
) -> bytes:
    """Encode the bootstrap: namespaces to create (`create`, CLONE_NEW* bits), to join from the pidfd (`join`) and to
    join by path (OCI type, path), and what must happen outside of them.

    A runtime without privileges has `map_programs` (newuidmap, newgidmap) write the maps, or maps one id and denies
    `setgroups` (user_namespaces(7)).  With `keyring` the process gets a session keyring of its own.  Raises
    EncodingError.
    """
    parts = [number(CLONE_FLAGS, create)]
    if joined := ",".join(f"{NAMESPACES[kind][1]}:{path}" for kind, path in paths):
        parts.append(text(NS_PATHS, joined, "the list of namespace paths"))
    if join:
        parts.append(number(JOIN_MASK, join))
    if uid_lines := map_lines(uid_map):
        parts.append(text(UID_MAP, uid_lines, "linux.uidMappings"))
    if gid_lines := map_lines(gid_map):
        parts.append(text(GID_MAP, gid_lines, "linux.gidMappings"))
        parts.append(truth(SETGROUPS, setgroups))
    if oom_score_adj is not None:
        parts.append(text(OOM_SCORE_ADJ, str(oom_score_adj)))
    if not keyring:
        parts.append(truth(KEEP_KEYRING, True))
    if map_programs is not None:
        parts += [text(UID_MAP_PATH, map_programs[0]), text(GID_MAP_PATH, map_programs[1])]
    if time_offsets:
        lines = "".join(f"{clock} {o.secs} {o.nanosecs}\n" for clock, o in time_offsets.items())
        parts.append(text(TIME_OFFSETS, lines))
    return message(MESSAGE_BOOTSTRAP, b"".join(parts), "the bootstrap message")


def map_lines(mappings: Iterable[IdMapping]) -> str:
    """Format id maps as in /proc/PID/uid_map (user_namespaces(7))."""
    return "".join(f"{m.container_id} {m.host_id} {m.size}\n" for m in mappings)

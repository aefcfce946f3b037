"""The bytes that nsexec reads: netlink-framed messages (struct nlmsghdr, struct nlattr), native byte order.

The bootstrap message and its attribute numbers are those of runc (libcontainer/message_linux.go); see nsexec's plan.c.
"""

from __future__ import annotations

from struct import pack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from caisson.agent.libcontainer.config.spec import IdMapping, TimeOffset

MESSAGE_BOOTSTRAP = 62000
MESSAGE_PLAN = 62001
MESSAGE_STRINGS = 62002

CLONE_FLAGS = 27281
NS_PATHS = 27282
UID_MAP = 27283
GID_MAP = 27284
SETGROUPS = 27285
OOM_SCORE_ADJ = 27286
ROOTLESS = 27287
TIME_OFFSETS = 27290
JOIN_MASK = 27350  # ours: what to join from the pidfd

# clone(2); OCI name -> (flag, name of the file in /proc/PID/ns)
NAMESPACES: dict[str, tuple[int, str]] = {
    "user": (0x10000000, "user"),
    "ipc": (0x08000000, "ipc"),
    "uts": (0x04000000, "uts"),
    "network": (0x40000000, "net"),
    "pid": (0x20000000, "pid"),
    "mount": (0x00020000, "mnt"),
    "cgroup": (0x02000000, "cgroup"),
    "time": (0x00000080, "time"),
}

MESSAGE_LIMITS = {MESSAGE_BOOTSTRAP: 1 << 20, MESSAGE_PLAN: 1 << 20, MESSAGE_STRINGS: (2 << 20) - 4096}


class EncodingError(Exception):
    """Something does not fit into the message: `what` is too large."""

    def __init__(self, what: str, size: int, limit: int) -> None:
        super().__init__(f"{what} takes {size} bytes, and at most {limit} can be passed")


def attribute(kind: int, payload: bytes, what: str = "attribute") -> bytes:
    """One struct nlattr, padded.  The length is 16 bits: too much is refused, never wrapped (CVE-2021-43784)."""
    size = 4 + len(payload)
    if size > 0xFFFF:
        raise EncodingError(what, len(payload), 0xFFFF - 4)
    return pack("=HH", size, kind) + payload + bytes(-size % 4)


def text(kind: int, value: str | bytes, what: str = "attribute") -> bytes:
    """A NUL-terminated string; the NUL counts."""
    return attribute(kind, encode(value) + b"\0", what)


def number(kind: int, value: int) -> bytes:
    """A u32."""
    return attribute(kind, pack("=I", value))


def truth(kind: int, value: bool) -> bytes:
    """A boolean: one byte and three of padding that count as payload."""
    return attribute(kind, pack("=B3x", value))


def encode(value: str | bytes) -> bytes:
    """Text as the file system and execve see it."""
    return value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")


def message(kind: int, body: bytes, what: str) -> bytes:
    """A whole message with its header; raises EncodingError if nsexec would not read it."""
    size = 16 + len(body)
    if size > MESSAGE_LIMITS[kind]:
        raise EncodingError(what, size, MESSAGE_LIMITS[kind])
    return pack("=IHHII", size, kind, 1, 1, 0) + body


def strings(values: Iterable[str]) -> bytes:
    """argv followed by envp, each string NUL-terminated, padded to 4 bytes only by its length being read exactly."""
    return message(MESSAGE_STRINGS, b"".join([encode(value) + b"\0" for value in values]), "args and env")


def bootstrap(
    *,
    create: int = 0,
    join: int = 0,
    paths: Iterable[tuple[str, str]] = (),
    uid_map: Iterable[IdMapping] = (),
    gid_map: Iterable[IdMapping] = (),
    oom_score_adj: int | None = None,
    time_offsets: Mapping[str, TimeOffset] | None = None,
) -> bytes:
    """The bootstrap message: namespaces to make (`create`, CLONE_NEW* bits), to join from the pidfd (`join`) and to
    join by path (OCI type, path), and what must happen outside of them.  Raises EncodingError.
    """
    parts = [number(CLONE_FLAGS, create)]
    if joined := ",".join(f"{NAMESPACES[kind][1]}:{path}" for kind, path in paths):
        parts.append(text(NS_PATHS, joined, "the list of namespace paths"))
    if join:
        parts.append(number(JOIN_MASK, join))
    if uid_lines := _map_lines(uid_map):
        parts.append(text(UID_MAP, uid_lines, "linux.uidMappings"))
    if gid_lines := _map_lines(gid_map):
        parts.append(text(GID_MAP, gid_lines, "linux.gidMappings"))
        parts.append(truth(SETGROUPS, True))
    if oom_score_adj is not None:
        parts.append(text(OOM_SCORE_ADJ, str(oom_score_adj)))
    parts.append(truth(ROOTLESS, False))
    if time_offsets:
        lines = "".join(f"{clock} {o.secs} {o.nanosecs}\n" for clock, o in time_offsets.items())
        parts.append(text(TIME_OFFSETS, lines))
    return message(MESSAGE_BOOTSTRAP, b"".join(parts), "the bootstrap message")


def _map_lines(mappings: Iterable[IdMapping]) -> str:
    return "".join(f"{m.container_id} {m.host_id} {m.size}\n" for m in mappings)

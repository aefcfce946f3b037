"""Scheduling of a process: scheduler, I/O priority, CPUs, personality, memory policy.

Source: OCI runtime specification 1.3, config.md ("scheduler", "ioPriority", "execCPUAffinity") and config-linux.md
("personality", "memoryPolicy"); sched_setattr(2), ioprio_set(2), sched_setaffinity(2), personality(2).
"""

from __future__ import annotations

from struct import pack, unpack_from

from caisson.agent.libcontainer.config.reader import U64_MAX, Reader, SpecError
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

POLICIES = {
    "SCHED_OTHER": 0, "SCHED_FIFO": 1, "SCHED_RR": 2, "SCHED_BATCH": 3, "SCHED_ISO": 4, "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}  # fmt: skip
FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 0x01, "SCHED_FLAG_RECLAIM": 0x02, "SCHED_FLAG_DL_OVERRUN": 0x04,
    "SCHED_FLAG_KEEP_POLICY": 0x08, "SCHED_FLAG_KEEP_PARAMS": 0x10, "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}  # fmt: skip
CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
DOMAINS = {"LINUX": 0x0000, "LINUX32": 0x0008}
#: personality(2)
PERSONALITY_FLAGS = {
    "UNAME26": 0x0020000, "ADDR_NO_RANDOMIZE": 0x0040000, "FDPIC_FUNCPTRS": 0x0080000, "MMAP_PAGE_ZERO": 0x0100000,
    "ADDR_COMPAT_LAYOUT": 0x0200000, "READ_IMPLIES_EXEC": 0x0400000, "ADDR_LIMIT_32BIT": 0x0800000,
    "SHORT_INODE": 0x1000000, "WHOLE_SECONDS": 0x2000000, "STICKY_TIMEOUTS": 0x4000000, "ADDR_LIMIT_3GB": 0x8000000,
}  # fmt: skip
#: set_mempolicy(2)
MEMORY_MODES = {
    "MPOL_DEFAULT": 0, "MPOL_PREFERRED": 1, "MPOL_BIND": 2, "MPOL_INTERLEAVE": 3, "MPOL_LOCAL": 4,
    "MPOL_PREFERRED_MANY": 5, "MPOL_WEIGHTED_INTERLEAVE": 6,
}  # fmt: skip
MODES_WITHOUT_NODES = ("MPOL_DEFAULT", "MPOL_LOCAL")
MODES_WITH_NODES = ("MPOL_BIND", "MPOL_INTERLEAVE", "MPOL_PREFERRED_MANY", "MPOL_WEIGHTED_INTERLEAVE")
MEMORY_FLAGS = {"MPOL_F_NUMA_BALANCING": 1 << 13, "MPOL_F_RELATIVE_NODES": 1 << 14, "MPOL_F_STATIC_NODES": 1 << 15}
CPUS_MAX = 8192


class Affinity(Record):
    """CPU masks of a process while it is set up and when it runs; None if not given."""

    initial: bytes | None = None
    final: bytes | None = None


class MemoryPolicy(Record):
    """`mode` with its flags and a mask of nodes, as for set_mempolicy(2)."""

    mode: int
    nodes: bytes = b""


def scheduler(value: object, where: str) -> bytes:
    """Read `process.scheduler` as struct sched_attr.  Raises SpecError."""
    r = Reader(value, where)
    policy, bits = r.text("policy"), _flags(r, FLAGS)
    nice = r.number("nice", -20, 19) or 0
    priority = r.number("priority", 0, 99) or 0
    runtime, deadline, period = (r.number(key, 0, U64_MAX) or 0 for key in ("runtime", "deadline", "period"))
    r.done()
    if policy not in POLICIES:
        raise SpecError(r.name("policy"), f"{policy!r} is not one of {', '.join(POLICIES)}")
    return pack("=IIQiIQQQ", 48, POLICIES[policy], bits, nice, priority, runtime, deadline, period)


def is_lost_by_clone(attributes: bytes | None) -> bool:
    """Return whether a clone loses this scheduler: it is reset, or the clone fails (sched(7))."""
    if attributes is None:
        return False
    _, policy, flags = unpack_from("=IIQ", attributes)
    return policy == POLICIES["SCHED_DEADLINE"] or bool(flags & FLAGS["SCHED_FLAG_RESET_ON_FORK"])


def io_priority(value: object, where: str) -> int:
    """Read `process.ioPriority` as the kernel has it.  Raises SpecError."""
    r = Reader(value, where)
    kind, priority = r.text("class"), r.number("priority", 0, 7) or 0
    r.done()
    if kind not in CLASSES:
        raise SpecError(r.name("class"), f"{kind!r} is not one of {', '.join(CLASSES)}")
    return CLASSES[kind] << 13 | priority


def affinity(value: object, where: str) -> Affinity:
    """Read `process.execCPUAffinity`.  Raises SpecError."""
    r = Reader(value, where)
    sets = [_mask(r.text(key), r.name(key)) for key in ("initial", "final")]
    r.done()
    return Affinity(*sets)


def personality(value: object, where: str) -> int:
    """Read `linux.personality` as for personality(2).  Raises SpecError."""
    r = Reader(value, where)
    domain = r.text("domain")
    flags = _flags(r, PERSONALITY_FLAGS)
    r.done()
    if domain not in DOMAINS:
        raise SpecError(r.name("domain"), f"{domain!r} is not one of {', '.join(DOMAINS)}")
    return DOMAINS[domain] | flags


def memory_policy(value: object, where: str) -> MemoryPolicy:
    """Parse `linux.memoryPolicy`.  Raises SpecError."""
    r = Reader(value, where)
    mode, text = r.text("mode"), r.text("nodes")
    flags = _flags(r, MEMORY_FLAGS, "invalid memory policy flag: ")
    r.done()
    if mode not in MEMORY_MODES:
        raise SpecError(r.name("mode"), f"invalid memory policy mode: {mode!r} is not one of {', '.join(MEMORY_MODES)}")
    nodes = _mask(text, r.name("nodes"), "invalid memory policy nodes: ")
    count = int.from_bytes(nodes or b"", "little").bit_count()
    if count and mode in MODES_WITHOUT_NODES:
        raise SpecError(r.name("nodes"), f"memory policy mode requires 0 nodes but got {count}")
    if not count and mode in MODES_WITH_NODES:
        raise SpecError(r.name("nodes"), "memory policy mode requires at least one node but got 0")
    return MemoryPolicy(MEMORY_MODES[mode] | flags, nodes or b"")


def _flags(r: Reader, known: Mapping[str, int], wrong: str = "") -> int:
    bits = 0
    for flag in r.texts("flags"):
        if flag not in known:
            raise SpecError(r.name("flags"), f"{wrong}{flag!r} is not one of {', '.join(known)}")
        bits |= known[flag]
    return bits


def _mask(text: str, where: str, wrong: str = "") -> bytes | None:
    """Parse a list of CPUs or memory nodes like "0-3,7" into a mask of whole words."""
    if not text:
        return None
    mask = 0
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isascii() and first.isdecimal() and last.isascii() and last.isdecimal()):
            raise SpecError(where, f"{wrong}{text!r} is not a list of numbers")
        low, high = int(first), int(last)
        if not low <= high < CPUS_MAX:
            raise SpecError(where, f"{wrong}{part!r} is not a range below {CPUS_MAX}")
        mask |= ((1 << (high - low + 1)) - 1) << low
    return mask.to_bytes((mask.bit_length() + 63) // 64 * 8, "little")

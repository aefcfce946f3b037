"""How a process shares the machine: scheduler, I/O priority, CPUs, personality.

Source: OCI runtime specification 1.2, config.md ("scheduler", "ioPriority", "execCPUAffinity") and config-linux.md
("personality"); sched_setattr(2), ioprio_set(2), sched_setaffinity(2), personality(2).
"""

from __future__ import annotations

from struct import pack

from caisson.agent.base.record import Record
from caisson.agent.libcontainer.config.reader import U64_MAX, Reader, SpecError

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
CPUS_MAX = 8192


class Affinity(Record):
    """Sets of CPUs as masks, None where nothing is said: while a process is prepared, and when it runs."""

    initial: bytes | None = None
    final: bytes | None = None


def scheduler(value: object, where: str) -> bytes:
    """`process.scheduler` as struct sched_attr.  Raises SpecError."""
    r = Reader(value, where)
    policy, flags = r.text("policy"), r.texts("flags")
    nice = r.number("nice", -20, 19) or 0
    priority = r.number("priority", 0, 99) or 0
    runtime, deadline, period = (r.number(key, 0, U64_MAX) or 0 for key in ("runtime", "deadline", "period"))
    r.done()
    if policy not in POLICIES:
        raise SpecError(r.name("policy"), f"{policy!r} is not one of {', '.join(POLICIES)}")
    for flag in flags:
        if flag not in FLAGS:
            raise SpecError(r.name("flags"), f"{flag!r} is not one of {', '.join(FLAGS)}")
    bits = sum(FLAGS[flag] for flag in set(flags))
    return pack("=IIQiIQQQ", 48, POLICIES[policy], bits, nice, priority, runtime, deadline, period)


def io_priority(value: object, where: str) -> int:
    """`process.ioPriority` as the kernel has it.  Raises SpecError."""
    r = Reader(value, where)
    kind, priority = r.text("class"), r.number("priority", 0, 7) or 0
    r.done()
    if kind not in CLASSES:
        raise SpecError(r.name("class"), f"{kind!r} is not one of {', '.join(CLASSES)}")
    return CLASSES[kind] << 13 | priority


def affinity(value: object, where: str) -> Affinity:
    """`process.execCPUAffinity`.  Raises SpecError."""
    r = Reader(value, where)
    sets = [_mask(r.text(key), r.name(key)) for key in ("initial", "final")]
    r.done()
    return Affinity(*sets)


def personality(value: object, where: str) -> int:
    """`linux.personality` as for personality(2).  Raises SpecError."""
    r = Reader(value, where)
    domain = r.text("domain")
    r.refuse("flags", "no flag of a personality is supported")
    r.done()
    if domain not in DOMAINS:
        raise SpecError(r.name("domain"), f"{domain!r} is not one of {', '.join(DOMAINS)}")
    return DOMAINS[domain]


def _mask(text: str, where: str) -> bytes | None:
    """A list of CPUs like "0-3,7" as a mask of whole words."""
    if not text:
        return None
    mask = 0
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isascii() and first.isdecimal() and last.isascii() and last.isdecimal()):
            raise SpecError(where, f"{text!r} is not a list of CPUs")
        low, high = int(first), int(last)
        if not low <= high < CPUS_MAX:
            raise SpecError(where, f"{part!r} is not a range of CPUs below {CPUS_MAX}")
        mask |= ((1 << (high - low + 1)) - 1) << low
    return mask.to_bytes((mask.bit_length() + 63) // 64 * 8, "little")

"""linux.seccomp: the system calls that a container's processes may make.

Source: OCI runtime specification, config-linux.md, "Seccomp"; seccomp(2), seccomp_rule_add(3).
"""

from __future__ import annotations

from caisson.agent.libcontainer.config.reader import U32_MAX, U64_MAX, Reader, SpecError
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: Actions by name: the kernel's SECCOMP_RET_ values.
KILL_PROCESS, KILL_THREAD, TRAP, ERRNO, NOTIFY, TRACE, LOG, ALLOW = (
    0x80000000, 0x00000000, 0x00030000, 0x00050000, 0x7FC00000, 0x7FF00000, 0x7FFC0000, 0x7FFF0000,
)  # fmt: skip
ACTIONS = {
    "SCMP_ACT_KILL": KILL_THREAD,
    "SCMP_ACT_KILL_THREAD": KILL_THREAD,
    "SCMP_ACT_KILL_PROCESS": KILL_PROCESS,
    "SCMP_ACT_TRAP": TRAP,
    "SCMP_ACT_ERRNO": ERRNO,
    "SCMP_ACT_TRACE": TRACE,
    "SCMP_ACT_ALLOW": ALLOW,
    "SCMP_ACT_LOG": LOG,
    "SCMP_ACT_NOTIFY": NOTIFY,
}
EPERM = 1

#: Comparisons by name: libseccomp's enum scmp_compare.
NE, LT, LE, EQ, GE, GT, MASKED_EQ = range(1, 8)
COMPARISONS = {
    "SCMP_CMP_NE": NE,
    "SCMP_CMP_LT": LT,
    "SCMP_CMP_LE": LE,
    "SCMP_CMP_EQ": EQ,
    "SCMP_CMP_GE": GE,
    "SCMP_CMP_GT": GT,
    "SCMP_CMP_MASKED_EQ": MASKED_EQ,
}

#: seccomp(2)
SPEC_ALLOW, NEW_LISTENER, WAIT_KILLABLE_RECV = 4, 8, 32
FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 0,  # it has one thread
    "SECCOMP_FILTER_FLAG_LOG": 2,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": SPEC_ALLOW,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": WAIT_KILLABLE_RECV,
}

#: By the specification's names; libseccomp knows them in lower case.
ARCHITECTURES = tuple(
    f"SCMP_ARCH_{name}"
    for name in (
        "X86", "X86_64", "X32", "ARM", "AARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32",
        "PPC", "PPC64", "PPC64LE", "S390", "S390X", "PARISC", "PARISC64", "RISCV64",
        "LOONGARCH64", "M68K", "SH", "SHEB",
    )
)  # fmt: skip


class Condition(Record):
    """One comparison with argument `index` of a system call; `mask` is only for MASKED_EQ."""

    index: int
    comparison: int
    value: int
    mask: int = 0


class Rule(Record):
    """`action` (including its errno, as the kernel expects it) for system calls of these names, if all conditions
    hold.
    """

    names: tuple[str, ...]
    action: int
    conditions: tuple[Condition, ...] = ()

    @property
    def alternatives(self) -> tuple[tuple[Condition, ...], ...]:
        """The conditions of which all have to hold, in one of these groups.

        An argument has one condition, as libseccomp demands it; with several, any condition suffices, as in runc.
        """
        if len({one.index for one in self.conditions}) == len(self.conditions):
            return (self.conditions,)
        return tuple((one,) for one in self.conditions)


class Seccomp(Record):
    """A whole profile; `default` is the action for system calls that match no rule."""

    default: int
    architectures: tuple[str, ...] = ()
    flags: int = 0
    rules: tuple[Rule, ...] = ()
    listener_path: str = ""
    listener_metadata: str = ""

    @classmethod
    def from_json(cls, value: object, where: str) -> Seccomp:
        """Parse `linux.seccomp`.  Raises SpecError."""
        r = Reader(value, where)
        has_flags = r.raw("flags") is not None  # without flags, as in runc: no speculation mitigations
        flags = sum({FLAGS[name] for name in r.each("flags", _one_of(FLAGS, "a flag of a filter"))})
        profile = cls(
            default=_action(r, "defaultAction", "defaultErrnoRet"),
            architectures=r.each("architectures", _one_of(ARCHITECTURES, "an architecture")),
            flags=flags if has_flags else SPEC_ALLOW,
            rules=r.each("syscalls", _rule),
            listener_path=r.text("listenerPath"),
            listener_metadata=r.text("listenerMetadata"),
        )
        r.done()
        return _with_listener(profile, r)


def _with_listener(profile: Seccomp, r: Reader) -> Seccomp:
    """Return the profile with the flags for its listener, if it has one.  Raises SpecError for what would hang."""
    notified = [rule for rule in profile.rules if rule.action == NOTIFY]
    if profile.default == NOTIFY:
        raise SpecError(r.name("defaultAction"), "SCMP_ACT_NOTIFY cannot be used as the default action")
    if any("write" in rule.names for rule in notified):
        raise SpecError(r.name("syscalls"), "SCMP_ACT_NOTIFY cannot be used for the write syscall")
    if notified and not profile.listener_path:
        raise SpecError(r.name("listenerPath"), "is missing: SCMP_ACT_NOTIFY needs somebody to notify")
    if profile.listener_metadata and not profile.listener_path:
        raise SpecError(r.name("listenerMetadata"), "needs a listenerPath")
    if not notified and profile.flags & WAIT_KILLABLE_RECV:
        raise SpecError(r.name("flags"), "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV needs a rule of SCMP_ACT_NOTIFY")
    if not notified:
        return profile.but(listener_path="")
    return profile.but(flags=profile.flags | NEW_LISTENER)


def _action(r: Reader, key: str, errno_key: str) -> int:
    name = r.text(key)
    errno = r.number(errno_key, 0, 4095)  # MAX_ERRNO
    if name not in ACTIONS:
        raise SpecError(r.name(key), f"{name!r} is not one of {', '.join(ACTIONS)}")
    action = ACTIONS[name]
    if action in (ERRNO, TRACE):
        return action | (EPERM if errno is None else errno)
    if errno:
        raise SpecError(r.name(errno_key), f"{name} has no errno")
    return action


def _one_of(known: dict[str, int] | tuple[str, ...], what: str) -> Callable[[object, str], str]:
    def parse(value: object, where: str) -> str:
        if not isinstance(value, str) or value not in known:
            raise SpecError(where, f"{value!r} is not {what}")
        return value

    return parse


def _rule(value: object, where: str) -> Rule:
    r = Reader(value, where)
    rule = Rule(r.texts("names"), _action(r, "action", "errnoRet"), r.each("args", _condition))
    r.done()
    if not rule.names:
        raise SpecError(r.name("names"), "is missing: a rule is about system calls")
    return rule


def _condition(value: object, where: str) -> Condition:
    r = Reader(value, where)
    index = r.number("index", 0, U32_MAX) or 0
    first, second = (r.number(key, 0, U64_MAX) or 0 for key in ("value", "valueTwo"))
    name = r.text("op")
    r.done()
    if index > 5:
        raise SpecError(r.name("index"), f"system calls have arguments 0 to 5, not {index}")
    if name not in COMPARISONS:
        raise SpecError(r.name("op"), f"{name!r} is not one of {', '.join(COMPARISONS)}")
    # Of MASKED_EQ the first is the mask (seccomp_rule_add(3)).
    if COMPARISONS[name] == MASKED_EQ:
        return Condition(index, MASKED_EQ, value=second, mask=first)
    return Condition(index, COMPARISONS[name], value=first)

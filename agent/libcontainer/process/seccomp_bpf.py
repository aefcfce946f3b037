"""Compile seccomp profiles into BPF programs.

libseccomp has the tables: architectures, and the numbers of their system calls.  A program finds the architecture,
then by binary search the range of numbers with one outcome, and compares arguments where rules have conditions.
libseccomp's own compiler takes ten times as long, and its programs are four times as large; it is left for profiles
whose meaning only it can tell (LibraryNeeded).  Outcomes are the same, except where its programs err: with several
rules for one call and other comparisons than for equality, they may compare an argument with another one's value, or
forget an alternative.

One outcome libseccomp does not have: system calls newer than any that the profile knows get ENOSYS, not the profile's
default action.  A C library that tries a new call first takes ENOSYS for "use the old one", and EPERM for a failure.
"""

from __future__ import annotations

import operator
from functools import lru_cache
from itertools import combinations
from struct import pack

from caisson.agent.libcontainer.config.reader import U32_MAX, U64_MAX, SpecError
from caisson.agent.libcontainer.config.seccomp import (
    ALLOW,
    EQ,
    ERRNO,
    GE,
    GT,
    KILL_THREAD,
    LE,
    LOG,
    LT,
    MASKED_EQ,
    NE,
    Condition,
)  # fmt: skip
from caisson.agent.libcontainer.process.bpf import AT_LEAST, END, EQUAL, GREATER, Assembler
from caisson.agent.libcontainer.process.libseccomp import Libseccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from caisson.agent.libcontainer.config.seccomp import Seccomp

    #: An action, and conditions that all have to hold; their masks are the bits of the arguments that count.
    Alternative = tuple[int, tuple[Condition, ...]]
    #: An action or PASS; or alternatives, the first of which decides, or else the profile's default action.
    Outcome = int | tuple[Alternative, ...]
    #: The first number of a range, which ends where the next one begins, and the outcome of all.
    Range = tuple[int, Outcome]
    #: Numbers of system calls by name, by architecture.
    Known = Mapping[int, Mapping[str, int]]

MAX_PROGRAMS = 32
ENOSYS = 38
INSTRUCTIONS_MAX = 4096  # BPF_MAXINSNS

#: Where seccomp_data has the number, the architecture and the arguments.
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16

#: No action: the program that follows decides.
PASS = -1

#: For architectures that a profile does not name, as by libseccomp.
FOREIGN = KILL_THREAD

#: The architectures that programs are made for here, all little-endian, with the bits of their arguments.
X86, X86_64, X32, ARM, AARCH64 = 0x40000003, 0xC000003E, 0x4000003E, 0x40000028, 0xC00000B7
ARGUMENTS = {X86: U32_MAX, X86_64: U64_MAX, X32: U32_MAX, ARM: U32_MAX, AARCH64: U64_MAX}

#: x32 is a part of x86_64 to the kernel, with this bit in its numbers.
X32_BIT = 0x40000000

#: The number by which a tracer skips a system call (seccomp(2)).
SKIPPED = U32_MAX

#: x86's calls that stand for several, which the first argument tells apart.
SOCKETCALL, IPC = 102, 117

#: Numbers of their own that Linux later gave to the calls behind those.
DIRECT = {
    name: first + index
    for first, names in (
        (337, "recvmmsg"),
        (345, "sendmmsg"),
        (359, "socket socketpair bind connect listen accept4 getsockopt setsockopt getsockname getpeername sendto"),
        (370, "sendmsg recvfrom recvmsg shutdown"),
        (393, "semget semctl shmget shmctl shmat shmdt msgget msgsnd msgrcv msgctl"),
    )
    for index, name in enumerate(names.split())
}

HOLDS = {NE: operator.ne, LT: operator.lt, LE: operator.le, EQ: operator.eq, GE: operator.ge, GT: operator.gt}


class LibraryNeeded(Exception):
    """Only libseccomp can tell what the profile means: two rules match the same call and differ in their actions; or
    one of its architectures is not in ARGUMENTS.
    """


@lru_cache(MAX_PROGRAMS)
def program(profile: Seccomp) -> bytes:
    """Return the filter's flags (32 bits) and instructions.  Raises SpecError."""
    library = Libseccomp()
    names = {name for rule in profile.rules for name in rule.names}
    known = {token: library.numbers(token, names) for token in library.architectures(profile)}
    try:
        compiled = compile_profile(profile, known)
    except LibraryNeeded:
        compiled = only_newer(profile, known) + library.compile(profile, known)
    count = len(compiled) // 8
    if count > INSTRUCTIONS_MAX:
        raise SpecError("linux.seccomp", f"makes {count} instructions; the kernel accepts at most {INSTRUCTIONS_MAX}")
    return pack("=I", profile.flags) + compiled


def compile_profile(profile: Seccomp, known: Known) -> bytes:
    """Compile a profile into instructions.  Raises LibraryNeeded."""
    if not known.keys() <= ARGUMENTS.keys() or (X32 in known and X86_64 not in known):
        raise LibraryNeeded
    tables = {token: _outcomes(profile, token, numbers) for token, numbers in known.items()}
    return _assemble(_ranges(profile, known, tables, profile.default, FOREIGN), profile.default, FOREIGN)


def only_newer(profile: Seccomp, known: Known) -> bytes:
    """Return the instructions for ENOSYS, to be followed by a program that decides about all other calls."""
    return _assemble(_ranges(profile, known, {token: {} for token in known}, PASS, PASS), PASS, PASS)


def _outcomes(profile: Seccomp, token: int, numbers: Mapping[str, int]) -> dict[int, Outcome]:
    """Return the outcomes of an architecture's numbers that rules are about.

    The first rule without conditions overrides all others about a number, also earlier ones, as in libseccomp.
    """
    decided: dict[int, Outcome] = {}
    found: dict[int, list[Alternative]] = {}

    def add(number: int, action: int, conditions: tuple[Condition, ...]) -> None:
        if conditions:
            found.setdefault(number, []).append((action, conditions))
        else:
            decided.setdefault(number, action)

    for rule in profile.rules:
        for conditions in rule.alternatives if rule.action != profile.default else ():
            effective = _effective(conditions, token)
            for name in rule.names:
                number = numbers[name]
                if number >= 0:
                    add(number, rule.action, effective)
                elif token == X86:
                    for behind, compared in _multiplexed(name, number, effective):
                        add(behind, rule.action, compared)
    return {number: _either(alternatives) for number, alternatives in found.items() if number not in decided} | decided


def _multiplexed(
    name: str, number: int, conditions: tuple[Condition, ...]
) -> Iterator[tuple[int, tuple[Condition, ...]]]:
    """Return the numbers of a call that x86 has behind another, by libseccomp's negative number for it.

    Its arguments are in memory then, out of a filter's reach.  As in libseccomp, conditions are compared regardless,
    but for those on the argument that says which call it is.
    """
    for multiplexer, base in ((SOCKETCALL, -100), (IPC, -200)):
        if base - 24 <= number < base:
            which = Condition(0, EQ, base - number, U32_MAX)
            yield multiplexer, (which, *(one for one in conditions if one.index != 0))
            if name in DIRECT:
                yield DIRECT[name], conditions


def _effective(conditions: tuple[Condition, ...], token: int) -> tuple[Condition, ...]:
    """Return the conditions with masks, in an architecture's width; those that always hold are left out."""
    found = []
    for one in conditions:
        mask = ARGUMENTS[token] & (one.mask if one.comparison == MASKED_EQ else U64_MAX)
        if mask:
            found.append(Condition(one.index, one.comparison, one.value & mask, mask))
    return tuple(found)


def _either(alternatives: list[Alternative]) -> Outcome:
    """Return alternatives as an outcome, if their order does not matter.  Raises LibraryNeeded."""
    for (action, one), (other_action, other) in combinations(alternatives, 2):
        if action != other_action and not _exclude_each_other(one, other):
            raise LibraryNeeded
    return tuple(dict.fromkeys(alternatives))


def _exclude_each_other(one: tuple[Condition, ...], other: tuple[Condition, ...]) -> bool:
    """Return whether no call can match both; False if in doubt."""
    return any(
        first.index == second.index and (_excludes(first, second) or _excludes(second, first))
        for first in one
        for second in other
    )


def _excludes(one: Condition, other: Condition) -> bool:
    if one.comparison != EQ:
        return False
    if other.comparison == MASKED_EQ:
        return one.value & other.mask != other.value
    return not HOLDS[other.comparison](one.value, other.value)


def _ranges(
    profile: Seccomp, known: Known, tables: Mapping[int, Mapping[int, Outcome]], default: int, foreign: int
) -> dict[int, list[Range]]:
    """Return the ranges of numbers with one outcome, by architecture as the kernel has it.

    `default` is for numbers without a rule, `foreign` for x32's if x32 is foreign.
    """

    def ranges(token: int, first: int) -> list[Range]:
        outcomes = sorted(tables[token].items(), key=operator.itemgetter(0))
        last = max([-1, *known[token].values(), *tables[token]])
        newer = last >= first and profile.default not in (ALLOW, LOG, ERRNO | ENOSYS)
        if newer:
            outcomes.append((last + 1, ERRNO | ENOSYS))
        found: list[Range] = []
        current: Outcome | None = None
        after = first
        for number, outcome in outcomes:
            if number > after and current != default:
                found.append((after, default))
                current = default
            if outcome != current:
                found.append((number, outcome))
                current = outcome
            after = number + 1
        if not newer and current != default:
            found.append((after, default))
        return found

    every = {token: ranges(token, 0) for token in known if token != X32}
    if X86_64 in known:
        every[X86_64] += ranges(X32, X32_BIT) if X32 in known else [(X32_BIT, foreign), (SKIPPED, default)]
    return every


def _assemble(ranges: dict[int, list[Range]], default: int, foreign: int) -> bytes:
    """Return a program; `default` is for calls that match no alternative, `foreign` for other architectures."""
    assembler = Assembler()
    places: dict[Outcome, int] = {PASS: END}

    def place(outcome: Outcome) -> int:
        if outcome not in places:
            if isinstance(outcome, int):
                places[outcome] = assembler.value(outcome)
            else:
                places[outcome] = _alternatives(assembler, outcome, place(default))
        return places[outcome]

    def search(ranges: list[Range]) -> int:
        if len(ranges) == 1:
            return place(ranges[0][1])
        middle = len(ranges) // 2
        above = search(ranges[middle:])
        return assembler.compare(AT_LEAST, ranges[middle][0], above, search(ranges[:middle]))

    found = {token: assembler.load(NUMBER_AT, search(ranges[token])) for token in reversed(ranges)}
    then = place(foreign)
    for token, start in found.items():
        then = assembler.compare(EQUAL, token, start, then)
    assembler.load(ARCHITECTURE_AT, then)
    return assembler.program()


def _alternatives(assembler: Assembler, alternatives: tuple[Alternative, ...], default: int) -> int:
    then = default
    for action, conditions in reversed(alternatives):
        otherwise, then = then, assembler.value(action)
        for one in reversed(conditions):
            then = _condition(assembler, one, then, otherwise)
    return then


def _condition(assembler: Assembler, one: Condition, true: int, false: int) -> int:
    """Compare an argument, as two words: the accumulator has 32 bits."""
    if one.comparison in (NE, LT, LE):
        true, false = false, true
    low_at = ARGUMENTS_AT + 8 * one.index
    low, high = one.value & U32_MAX, one.value >> 32
    low_mask, high_mask = one.mask & U32_MAX, one.mask >> 32
    if one.comparison in (EQ, NE, MASKED_EQ):
        then = true
        if low_mask:
            then = assembler.load(low_at, assembler.mask(low_mask, assembler.compare(EQUAL, low, true, false)))
        if high_mask:
            equal = assembler.compare(EQUAL, high, then, false)
            then = assembler.load(low_at + 4, assembler.mask(high_mask, equal))
        return then
    comparison = AT_LEAST if one.comparison in (GE, LT) else GREATER
    then = assembler.load(low_at, assembler.compare(comparison, low, true, false))
    if high_mask:
        equal = assembler.compare(EQUAL, high, then, false)
        then = assembler.load(low_at + 4, assembler.compare(GREATER, high, true, equal))
    return then

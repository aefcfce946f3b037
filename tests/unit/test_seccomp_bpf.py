"""Test programs of seccomp profiles against what the profiles say, and against libseccomp's programs.

libseccomp errs where a system call has several alternatives with other comparisons than for equality: it compares an
argument with another one's value, or takes x < 8 for done by x < 2.  It is asked where it is right.
"""

from __future__ import annotations

import asyncio
import ctypes
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import pytest

from caisson.agent.base.log import Log
from caisson.agent.client.seccomp import default_profile
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.seccomp import (
    ALLOW,
    EQ,
    ERRNO,
    GE,
    GT,
    KILL_PROCESS,
    KILL_THREAD,
    LE,
    LOG,
    LT,
    MASKED_EQ,
    NE,
    TRACE,
    TRAP,
    Condition,
    Rule,
    Seccomp,
)  # fmt: skip
from caisson.agent.libcontainer.process import seccomp_bpf
from caisson.agent.libcontainer.process.launcher import ProcessLauncher
from caisson.agent.libcontainer.process.libseccomp import LIBRARY, Libseccomp
from caisson.agent.libcontainer.process.seccomp_bpf import AARCH64, ARM, DIRECT, X32, X32_BIT, X86, X86_64
from caisson.agent.libcontainer.process.starter import Starter
from caisson.agent.model.reaper import Reaper
from caisson.agent.model.waits import AsyncioWaits
from tests.support.bpf import Instructions, instructions, run

if TYPE_CHECKING:
    from caisson.agent.libcontainer.process.nsexec import Nsexec

try:
    ctypes.CDLL(LIBRARY)
except OSError:
    pytest.skip(f"needs {LIBRARY}", allow_module_level=True)

Known = dict[int, dict[str, int]]

U32, U64 = (1 << 32) - 1, (1 << 64) - 1
EPERM, ENOSYS = ERRNO | 1, ERRNO | 38
FOREIGN = 0xC0000016  # AUDIT_ARCH_S390X: in none of the profiles

#: Names that differ between architectures: multiplexed on x86, not there at all, beyond the others' numbers.
SPECIAL = [
    "socket", "bind", "accept", "accept4", "recvmmsg", "sendmmsg", "semop", "semtimedop", "semget", "shmat",
    "socketcall", "ipc", "personality", "clone", "read", "stime", "mmap2", "set_tls", "uselib", "not_a_system_call",
]  # fmt: skip
VALUES = [0, 1, 2, 8, 16, U32 - 1, U32, 1 << 32, U32 + 2, (1 << 32) + 8, 2 << 32, 0x7E020000, 1 << 63, U64, U64 - U32]
ACTIONS = [ALLOW, EPERM, ENOSYS, ERRNO | 13, KILL_THREAD, KILL_PROCESS, TRAP, LOG, TRACE | 5]
TOKENS = {"X86_64": X86_64, "X86": X86, "X32": X32, "AARCH64": AARCH64, "ARM": ARM}


def profile(default: int, *rules: Rule, architectures: str = "X86_64 X86 X32 AARCH64 ARM") -> Seccomp:
    return Seccomp(default, tuple(f"SCMP_ARCH_{name}" for name in architectures.split()), 0, rules)


def rule(names: str, action: int, *conditions: tuple[int, ...]) -> Rule:
    return Rule(tuple(names.split()), action, tuple(Condition(*one) for one in conditions))


def known(value: Seccomp) -> Known:
    library = Libseccomp()
    names = {name for rule in value.rules for name in rule.names}
    return {token: library.numbers(token, names) for token in library.architectures(value)}


def alternatives(value: Seccomp, known: Known, token: int) -> dict[int, list[tuple[int, tuple[Condition, ...]]]]:
    """Return actions and conditions by number; their values have the architecture's width."""
    found: dict[int, list[tuple[int, tuple[Condition, ...]]]] = {}
    width = U64 if token in (X86_64, AARCH64) else U32

    def add(number: int, action: int, conditions: Iterable[Condition]) -> None:
        narrowed = [one.but(value=one.value & width, mask=one.mask & width) for one in conditions]
        needed = tuple(one for one in narrowed if one.comparison != MASKED_EQ or one.mask)
        found.setdefault(number, []).append((action, needed))

    for rule in value.rules:
        for name in rule.names if rule.action != value.default else ():
            number = known[token][name]
            for conditions in rule.alternatives:
                if number >= 0:
                    add(number, rule.action, conditions)
                elif token == X86 and -224 <= number <= -101:
                    multiplexer, which = (102, -100 - number) if number > -200 else (117, -200 - number)
                    rest = [one for one in conditions if one.index]
                    add(multiplexer, rule.action, [Condition(0, EQ, which), *rest])
                    if name in DIRECT:
                        add(DIRECT[name], rule.action, conditions)
    return found


def holds(one: Condition, value: int) -> bool:
    return {
        NE: value != one.value, LT: value < one.value, LE: value <= one.value, EQ: value == one.value,
        GE: value >= one.value, GT: value > one.value, MASKED_EQ: value & one.mask == one.value & one.mask,
    }[one.comparison]  # fmt: skip


class Meaning:
    """What a profile says, without a program."""

    def __init__(self, value: Seccomp, known: Known) -> None:
        self.default = value.default
        self.alternatives = {token: alternatives(value, known, token) for token in known}
        self.last = {token: max([-1, *numbers.values(), *self.alternatives[token]]) for token, numbers in known.items()}
        if value.default in (ALLOW, LOG, ENOSYS):
            self.last = dict.fromkeys(known, -1)

    def newer(self, architecture: int, number: int) -> bool:
        """Return whether the profile knows the architecture, but no system call as new as this."""
        return number > self.last.get(self.token(architecture, number), -1) >= 0

    def of(self, architecture: int, number: int, arguments: list[int]) -> int:
        token = self.token(architecture, number)
        if self.newer(architecture, number):
            return ENOSYS
        if token not in self.last:  # a number of -1 is a tracer's, not x32's
            return self.default if (token, number) == (X32, U32) and X86_64 in self.last else KILL_THREAD
        width = U64 if token in (X86_64, AARCH64) else U32
        found = self.alternatives[token].get(number, [])
        for action, conditions in sorted(found, key=lambda one: len(one[1]) > 0):
            if all(holds(one, arguments[one.index] & width) for one in conditions):
                return action
        return self.default

    def libseccomp_is_right(self, architecture: int, number: int) -> bool:
        found = self.alternatives.get(self.token(architecture, number), {}).get(number, [])
        return not self.newer(architecture, number) and (
            len(found) < 2 or all(one.comparison in (EQ, MASKED_EQ) for _, group in found for one in group)
        )

    @staticmethod
    def token(architecture: int, number: int) -> int:
        """Return the architecture as libseccomp has it."""
        return X32 if architecture == X86_64 and number >= X32_BIT else architecture


def around(values: Iterable[int]) -> list[int]:
    """Return values on both sides of some: of the number, and of each of its words."""
    near = {
        one & U64
        for value in values
        for one in (value - 1, value, value + 1, value ^ 1 << 32, value + (1 << 32), value & U32, value >> 32, ~value)
    }
    return sorted({0, *near})


def compare(value: Seccomp, seed: int, numbers: Iterable[int] = (), tries: int = 8) -> bool:
    """Compare a profile's programs, with system calls about what it compares; False if libseccomp is needed."""
    chance, found = random.Random(seed), known(value)
    try:
        own = instructions(seccomp_bpf.compile_profile(value, found))
    except seccomp_bpf.LibraryNeeded:
        return False
    try:
        reference: Instructions = instructions(Libseccomp().compile(value, found))
    except SpecError:  # it does not accept some orders of rules
        reference = []
    meaning = Meaning(value, found)
    conditions = [one for rule in value.rules for one in rule.conditions]
    arguments = around([one.value for one in conditions] + [one.mask for one in conditions])
    used = {number for token in found for number in (*found[token].values(), *meaning.alternatives[token])}
    near = {number + step for number in used if number >= 0 for step in (-1, 0, 1)} - {-1}
    beyond = {0, 600, X32_BIT - 1, X32_BIT, X32_BIT + 600, U32 - 1, U32}
    for architecture in (X86_64, X86, AARCH64, ARM, FOREIGN):
        for number in near | beyond | {*numbers}:
            for _ in range(tries):
                values = [chance.choice(arguments) for _ in range(6)]
                result = run(own, architecture, number, values)
                call = f"architecture {architecture:#x}, system call {number:#x}, {values}"
                assert result == meaning.of(architecture, number, values), call
                if reference and meaning.libseccomp_is_right(architecture, number):
                    assert result == run(reference, architecture, number, values), call
    return True


SWEEP = [*range(601), *range(X32_BIT, X32_BIT + 601)]


@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
@pytest.mark.parametrize("capabilities", [(), ("CAP_SYS_ADMIN", "CAP_SYS_CHROOT")])
def test_dockers_default_profile(architecture: str, capabilities: tuple[str, ...]) -> None:
    value = Seccomp.from_json(default_profile(capabilities, architecture), "linux.seccomp")
    assert compare(value, 0, SWEEP, tries=2)
    found = known(value)
    assert len(seccomp_bpf.compile_profile(value, found)) < len(Libseccomp().compile(value, found)) / 3


SOCKETS_OF_PODMAN = (
    rule("socket", ERRNO | 22, (0, EQ, 16), (2, EQ, 9)),
    rule("socket", ALLOW, (2, NE, 9)),
    rule("socket", ALLOW, (0, NE, 16)),
    rule("socketcall", ALLOW),
)


@pytest.mark.parametrize(
    "value",
    [
        profile(EPERM),
        profile(ALLOW),
        profile(KILL_PROCESS, rule("read write", ALLOW), architectures=""),
        profile(EPERM, rule("read write", ALLOW), architectures="X86"),
        profile(EPERM, rule("read write uselib", ALLOW), architectures="X32"),
        profile(EPERM, *SOCKETS_OF_PODMAN),
        profile(ENOSYS, *reversed(SOCKETS_OF_PODMAN)),
        # one without conditions overrides others, wherever it stands; the first such one decides
        profile(EPERM, rule("read", TRAP, (0, EQ, 1)), rule("read", ALLOW), rule("read", LOG, (0, EQ, 2))),
        profile(EPERM, rule("read", LOG), rule("read", ALLOW)),
        # a rule with the default action is none, but its names are known
        profile(EPERM, rule("read", EPERM), rule("read", ALLOW, (0, EQ, 1)), rule("write finit_module", EPERM)),
        profile(ALLOW, rule("read", ALLOW, (0, EQ, 1)), rule("read", EPERM, (1, EQ, 1))),
        # alternatives with conditions on one argument
        profile(EPERM, rule("personality", ALLOW, (0, EQ, 8), (0, EQ, 0), (0, GE, 1 << 33))),
        # each comparison, with a value whose words both count, and on 32 bits
        *(profile(EPERM, rule("read mmap2", ALLOW, (5, one, (2 << 32) + 8))) for one in (NE, LT, LE, EQ, GE, GT)),
        *(profile(EPERM, rule("read mmap2", ALLOW, (1, one, 1 << 63), (0, NE, 3))) for one in (NE, LT, LE, EQ, GE, GT)),
        profile(EPERM, rule("read", ALLOW, (0, MASKED_EQ, 8, 0xF)), rule("mmap2", ALLOW, (0, MASKED_EQ, 0, 8 << 32))),
        profile(EPERM, rule("clone", ALLOW, (1, MASKED_EQ, (3 << 32) + 1, (7 << 32) + 5))),
        # a mask of no bits always holds, and bits beyond the mask do not count
        profile(EPERM, rule("read", ALLOW, (0, MASKED_EQ, 1, 0)), rule("write", ALLOW, (0, MASKED_EQ, 0xFF, 0xF))),
        # x86's multiplexed system calls
        profile(EPERM, rule("socket accept semop semget sendmmsg", ALLOW), rule("bind", TRAP), architectures="X86"),
        profile(EPERM, rule("socket semget", ALLOW, (0, EQ, 2), (1, GT, 7)), rule("read", ALLOW), architectures="X86"),
        profile(EPERM, rule("socket", ALLOW), rule("socketcall", TRAP), rule("ipc", TRAP), rule("msgget", ALLOW)),
        # rules further apart than a comparison can jump
        profile(EPERM, *(rule("read clone", ALLOW, (0, EQ, one), (1, EQ, one << 33)) for one in range(9, 140))),
        profile(
            TRAP,
            rule("open", EPERM),
            *(rule(name, ALLOW, *((0, EQ, one) for one in range(80))) for name in ["read", "close", "poll", "ioctl"]),
            rule("write openat", LOG),
            rule("fstat", KILL_PROCESS, (0, GE, 7)),
        ),
    ],
)  # fmt: skip
def test_profiles_with_something_special(value: Seccomp) -> None:
    assert compare(value, 0, tries=100)


def chosen(seed: int) -> Seccomp:
    chance = random.Random(seed)
    actions = chance.sample(ACTIONS, chance.choice([1, 1, 2, 3]))
    names = sorted({*default_profile(())["syscalls"][0]["names"], *SPECIAL})

    def condition(index: int) -> tuple[int, ...]:
        comparison, value = chance.choice([NE, LT, LE, EQ, EQ, GE, GT, MASKED_EQ]), chance.choice(VALUES)
        return (index, comparison, value, chance.choice(VALUES) if comparison == MASKED_EQ else 0)

    def some_rule() -> Rule:
        among = chance.sample(SPECIAL, chance.randint(1, 3))
        if chance.random() < 0.2:
            among = chance.sample(names, chance.randint(1, 12))
        indices = chance.sample(range(6), chance.choice([0, 1, 1, 2, 3]))
        if chance.random() < 0.1:
            indices = [chance.randint(0, 1) for _ in indices]
        return rule(" ".join(among), chance.choice(actions), *map(condition, indices))

    architectures = " ".join(chance.sample(sorted(TOKENS), chance.randint(0, 5)))
    rules = [some_rule() for _ in range(chance.randint(1, 8))]
    return profile(chance.choice(ACTIONS), *rules, architectures=architectures)


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_profiles_by_chance(first: int) -> None:
    own = [compare(chosen(seed), seed) for seed in range(first, first + 50)]
    assert sum(own) > 30


@pytest.mark.parametrize(
    "value",
    [
        # it depends on libseccomp's order which of the two decides
        profile(EPERM, rule("read", TRAP, (0, GE, 1)), rule("read", ALLOW, (0, EQ, 1)), rule("write", ALLOW)),
        profile(EPERM, rule("read", ALLOW, (0, EQ, 1)), rule("read", TRAP, (1, EQ, 1))),
        # an architecture that is not made here
        profile(EPERM, rule("read write", ALLOW), architectures="RISCV64"),
    ],
)
def test_the_rest_is_left_to_libseccomp(value: Seccomp) -> None:
    found = known(value)
    with pytest.raises(seccomp_bpf.LibraryNeeded):
        seccomp_bpf.compile_profile(value, found)
    own = instructions(seccomp_bpf.program(value)[4:])
    reference = instructions(Libseccomp().compile(value, found))
    meaning = Meaning(value, found)
    for architecture in {*found, X86_64, FOREIGN} - {X32}:
        for number in (*range(300), X32_BIT + 1, U32):
            for first in (0, 1, 2):
                newer = meaning.newer(architecture, number)
                expected = ENOSYS if newer else run(reference, architecture, number, [first, 1])
                assert run(own, architecture, number, [first, 1]) == expected, (architecture, number, first)


def test_a_program_larger_than_the_kernel_accepts() -> None:
    value = profile(EPERM, *(rule("read", ALLOW, (0, EQ, one)) for one in range(1200)), architectures="")
    with pytest.raises(SpecError, match=r"^linux\.seccomp: makes 48\d\d instructions; the kernel accepts .* 4096$"):
        seccomp_bpf.program(value)


def test_flags_come_first() -> None:
    assert seccomp_bpf.program(profile(ALLOW).but(flags=6))[:4] == (6).to_bytes(4, "little")


async def test_other_work_continues_while_a_long_profile_is_compiled() -> None:
    rules = tuple(Rule(("read",), (ALLOW, ERRNO | 1)[value % 2], (Condition(0, EQ, value),)) for value in range(600))
    launcher = ProcessLauncher(Starter(cast("Nsexec", None), Reaper(), AsyncioWaits(), Log("error")))
    compiling = asyncio.ensure_future(launcher.filter(Seccomp(KILL_PROCESS, rules=rules)))
    turns = 0
    while not compiling.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert len(await compiling) > 600 * 8 and turns > 5

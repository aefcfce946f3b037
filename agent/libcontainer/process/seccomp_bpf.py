"""Compile seccomp profiles into BPF programs, by libseccomp.

libseccomp is loaded with the first profile.  What it cannot express is prepended to its program: system calls newer
than any the profile knows get ENOSYS, not the profile's default action.  A C library that tries a new call first takes
ENOSYS for "use the old one", and EPERM for a failure.
"""

from __future__ import annotations

import os
from struct import pack

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.seccomp import ALLOW, ERRNO, LOG, MASKED_EQ, Rule, Seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ctypes

    from caisson.agent.libcontainer.waits import Waits

LIBRARY = "libseccomp.so.2"
MAX_PROGRAMS = 32
ENOSYS = 38
INSTRUCTIONS_MAX = 4096  # BPF_MAXINSNS

#: With more rules than this a binary tree is searched instead of a list (seccomp_attr_set(3)).
TREE_FROM, OPTIMIZE, TREE = 32, 8, 2

#: Classic BPF (include/uapi/linux/bpf_common.h), and where seccomp_data has number and architecture.
LOAD, JUMP, JUMP_EQUAL, JUMP_GREATER, JUMP_AT_LEAST, RETURN = 0x20, 0x05, 0x15, 0x25, 0x35, 0x06
NUMBER_AT, ARCHITECTURE_AT = 0, 4

X86_64, X32 = 0xC000003E, 0x4000003E
X32_BIT = 0x40000000


class Filters:
    """Compile profiles, and cache the latest programs: compiling takes up to 20 ms, and containers share profiles."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        self._kept: dict[Seccomp, bytes] = {}

    async def program(self, profile: Seccomp) -> bytes:
        """Return the filter's flags (32 bits) and instructions.  Raises SpecError.

        Compiled in a thread, so that other work continues.
        """
        found = self._kept.pop(profile, None)
        if found is None:
            found = await self._waits.work(lambda: _program(profile))
            if len(self._kept) >= MAX_PROGRAMS:
                del self._kept[next(iter(self._kept))]
        self._kept[profile] = found  # to the end: the oldest are evicted first
        return found


def _program(profile: Seccomp) -> bytes:
    compiled = _Library().compile(profile)
    if len(compiled) > INSTRUCTIONS_MAX * 8:
        raise SpecError(
            "linux.seccomp", f"makes {len(compiled) // 8} instructions; the kernel accepts at most {INSTRUCTIONS_MAX}"
        )
    return pack("=I", profile.flags) + compiled


class _Library:
    """The parts of libseccomp that are needed.  https://github.com/seccomp/libseccomp, seccomp.h"""

    def __init__(self) -> None:
        import ctypes

        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise SpecError("linux.seccomp", f"needs {LIBRARY} (Debian: libseccomp2): {error}") from None

        class Comparison(ctypes.Structure):
            _fields_ = (
                ("arg", ctypes.c_uint),
                ("op", ctypes.c_int),
                ("datum_a", ctypes.c_uint64),
                ("datum_b", ctypes.c_uint64),
            )

        library.seccomp_init.restype = ctypes.c_void_p
        library.seccomp_arch_native.restype = ctypes.c_uint32
        library.seccomp_arch_resolve_name.restype = ctypes.c_uint32
        self._ctypes = ctypes
        self._comparison = Comparison
        self._library = library

    def compile(self, profile: Seccomp) -> bytes:
        """Compile a profile into instructions.  Raises SpecError."""
        context = self._library.seccomp_init(self._ctypes.c_uint32(profile.default))
        if not context:
            raise SpecError("linux.seccomp.defaultAction", "is not one that libseccomp accepts")
        filter_ = self._ctypes.c_void_p(context)
        try:
            architectures = self._architectures(filter_, profile)
            if sum(len(rule.names) for rule in profile.rules) > TREE_FROM:
                tree = self._ctypes.c_uint32(TREE)
                _check(self._library.seccomp_attr_set(filter_, OPTIMIZE, tree), "linux.seccomp")
            for index, rule in enumerate(profile.rules):
                if rule.action != profile.default:
                    self._add(filter_, rule, f"linux.seccomp.syscalls[{index}]")
            return self._newer(profile, architectures) + self._export(filter_)
        finally:
            self._library.seccomp_release(filter_)

    def _architectures(self, filter_: ctypes.c_void_p, profile: Seccomp) -> list[int]:
        found = [int(self._library.seccomp_arch_native())]
        for index, name in enumerate(profile.architectures):
            where = f"linux.seccomp.architectures[{index}]"
            token = int(self._library.seccomp_arch_resolve_name(name.removeprefix("SCMP_ARCH_").lower().encode()))
            if not token:
                raise SpecError(where, f"{name} is not known to this machine's libseccomp")
            if token not in found:
                _check(self._library.seccomp_arch_add(filter_, self._ctypes.c_uint32(token)), where)
                found.append(token)
        return found

    def _add(self, filter_: ctypes.c_void_p, rule: Rule, where: str) -> None:
        conditions = []
        for one in rule.conditions:
            data = (one.mask, one.value) if one.comparison == MASKED_EQ else (one.value, 0)
            conditions.append(self._comparison(one.index, one.comparison, *data))
        # libseccomp accepts one condition per argument; several become alternatives, each its own rule, as in runc.
        several = len({one.index for one in rule.conditions}) != len(conditions)
        groups = [[one] for one in conditions] if several else [conditions]
        for name in rule.names:
            number = self._library.seccomp_syscall_resolve_name(name.encode())
            if number == -1:  # unknown to this library: no rule can match it
                continue
            for group in groups:
                array = (self._comparison * len(group))(*group)
                count, action = self._ctypes.c_uint(len(group)), self._ctypes.c_uint32(rule.action)
                result = self._library.seccomp_rule_add_array(filter_, action, number, count, array)
                _check(result, f"{where}: {name}")

    def _export(self, filter_: ctypes.c_void_p) -> bytes:
        fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        try:
            _check(self._library.seccomp_export_bpf(filter_, fd), "linux.seccomp")
            return os.pread(fd, 8 * INSTRUCTIONS_MAX + 8, 0)
        finally:
            os.close(fd)

    def _newer(self, profile: Seccomp, architectures: list[int]) -> bytes:
        """Encode ENOSYS for numbers above the last one that the profile knows."""
        if profile.default in (ALLOW, LOG, ERRNO | ENOSYS):
            return b""
        last = {token: self._last(profile, token) for token in architectures}
        blocks = [
            _block(token, number, last.get(X32, -1))
            for token, number in last.items()
            if token != X32 and number >= 0  # x32 is a part of x86_64 to the kernel
        ]
        program = _instruction(LOAD, ARCHITECTURE_AT)
        for index, block in enumerate(blocks):
            rest = sum(len(one) for one in blocks[index + 1 :]) // 8
            program += block + _instruction(JUMP, rest + (len(blocks) - index - 1) * 2 + 1) + _enosys()
        return program if blocks else b""

    def _last(self, profile: Seccomp, architecture: int) -> int:
        """Return the highest system call number in the profile, on an architecture; -1 if there is none."""
        resolve = self._library.seccomp_syscall_resolve_name_arch
        token = self._ctypes.c_uint32(architecture)
        return max((resolve(token, name.encode()) for rule in profile.rules for name in rule.names), default=-1)


def _check(result: int, where: str) -> None:
    if result < 0:
        raise SpecError(where, f"libseccomp refuses it: {os.strerror(-result).lower()}")


def _instruction(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
    return pack("=HBBI", code, true, false, value)


def _enosys() -> bytes:
    return _instruction(RETURN, ERRNO | ENOSYS)


def _block(architecture: int, last: int, last_x32: int) -> bytes:
    """Encode one architecture: go to the second instruction after this for a number above the last, else to the first.

    That is a jump over what follows; and for another architecture it is the third.
    """
    body = _instruction(LOAD, NUMBER_AT)
    if architecture == X86_64:
        # Numbers with this bit are x32's: for a profile without x32, libseccomp's program rejects them.
        if last_x32 >= 0:
            body += _instruction(JUMP_AT_LEAST, X32_BIT, true=0, false=1) + _instruction(JUMP_GREATER, last_x32, 2, 1)
        else:
            body += _instruction(JUMP_AT_LEAST, X32_BIT, true=1, false=0)
    body += _instruction(JUMP_GREATER, last, true=1, false=0)
    return _instruction(JUMP_EQUAL, architecture, true=0, false=len(body) // 8 + 2) + body

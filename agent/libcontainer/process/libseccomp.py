"""The parts of libseccomp that are needed.  https://github.com/seccomp/libseccomp, seccomp.h"""

from __future__ import annotations

import ctypes
import os
from itertools import repeat

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.seccomp import MASKED_EQ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from caisson.agent.libcontainer.config.seccomp import Rule, Seccomp

LIBRARY = "libseccomp.so.2"

#: Search a binary tree instead of a list (seccomp_attr_set(3)).  The code for a list forgets to load the number if the
#: architecture does not have the call of the first rule.
OPTIMIZE, TREE = 8, 2


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


class Libseccomp:
    """The library: its tables of architectures and system calls, and its compiler."""

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise SpecError("linux.seccomp", f"needs {LIBRARY} (Debian: libseccomp2): {error}") from None
        library.seccomp_init.restype = ctypes.c_void_p
        library.seccomp_arch_native.restype = ctypes.c_uint32
        library.seccomp_arch_resolve_name.restype = ctypes.c_uint32
        self._library = library

    def architectures(self, profile: Seccomp) -> list[int]:
        """Return the tokens of a profile's architectures, after that of the machine's own.  Raises SpecError."""
        found = [int(self._library.seccomp_arch_native())]
        for index, name in enumerate(profile.architectures):
            token = int(self._library.seccomp_arch_resolve_name(name.removeprefix("SCMP_ARCH_").lower().encode()))
            if not token:
                where = f"linux.seccomp.architectures[{index}]"
                raise SpecError(where, f"{name} is not known to this machine's libseccomp")
            if token not in found:
                found.append(token)
        return found

    def numbers(self, architecture: int, names: Collection[str]) -> dict[str, int]:
        """Return the numbers of system calls; they are negative for those that an architecture does not have."""
        resolve, token = self._library.seccomp_syscall_resolve_name_arch, ctypes.c_uint32(architecture)
        return dict(zip(names, map(resolve, repeat(token), map(str.encode, names)), strict=False))

    def compile(self, profile: Seccomp, architectures: Iterable[int]) -> bytes:
        """Compile a profile into instructions.  Raises SpecError."""
        context = self._library.seccomp_init(ctypes.c_uint32(profile.default))
        if not context:
            raise SpecError("linux.seccomp.defaultAction", "is not one that libseccomp accepts")
        filter_ = ctypes.c_void_p(context)
        try:
            for token in architectures:
                if self._library.seccomp_arch_exist(filter_, ctypes.c_uint32(token)):
                    added = self._library.seccomp_arch_add(filter_, ctypes.c_uint32(token))
                    _check(added, "linux.seccomp.architectures")
            _check(self._library.seccomp_attr_set(filter_, OPTIMIZE, ctypes.c_uint32(TREE)), "linux.seccomp")
            for index, rule in enumerate(profile.rules):
                if rule.action != profile.default:
                    self._add(filter_, rule, f"linux.seccomp.syscalls[{index}]")
            return self._export(filter_)
        finally:
            self._library.seccomp_release(filter_)

    def _add(self, filter_: ctypes.c_void_p, rule: Rule, where: str) -> None:
        for name in rule.names:
            number = self._library.seccomp_syscall_resolve_name(name.encode())
            if number == -1:  # unknown to this library: no rule can match it
                continue
            for conditions in rule.alternatives:
                compared = [
                    _Comparison(one.index, one.comparison, one.mask, one.value)
                    if one.comparison == MASKED_EQ
                    else _Comparison(one.index, one.comparison, one.value, 0)
                    for one in conditions
                ]
                array = (_Comparison * len(compared))(*compared)
                count, action = ctypes.c_uint(len(compared)), ctypes.c_uint32(rule.action)
                result = self._library.seccomp_rule_add_array(filter_, action, number, count, array)
                _check(result, f"{where}: {name}")

    def _export(self, filter_: ctypes.c_void_p) -> bytes:
        fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        try:
            _check(self._library.seccomp_export_bpf(filter_, fd), "linux.seccomp")
            return os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)


def _check(result: int, where: str) -> None:
    if result < 0:
        raise SpecError(where, f"libseccomp refuses it: {os.strerror(-result).lower()}")

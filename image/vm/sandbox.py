"""Confine the processes of a VM between fork and exec: a guest that breaks out into one of them gains little.

A confined process gains no privileges (no_new_privs), has only the capabilities that it needs, creates no file larger
than it needs and no core dump, and dies with its parent.  If root has started it, it has its own mounts, which are
read-only except for the directories that it must write to.  QEMU and the vsock device cannot set set-user-ID or
set-group-ID bits, so that no such file appears on the host through 9p; QEMU also has its own filter (-sandbox on).

Everything here runs in a child of a single-threaded process.  Sources: prctl(2), capabilities(7), mount_setattr(2),
seccomp(2); Linux, include/uapi/linux/{capability,filter,seccomp,audit}.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from caisson.proto.record import Record

PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECCOMP_MODE_FILTER = 2
CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_SLAVE = 0x1000, 0x4000, 0x80000
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SYS_MOUNT_SETATTR = 442
MOUNT_ATTR_RDONLY = 1
LINUX_CAPABILITY_VERSION_3 = 0x20080522

#: Capabilities by number.
CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_FSETID, CAP_KILL = range(6)
CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_NET_BIND_SERVICE = 6, 7, 8, 10
CAP_SYS_CHROOT, CAP_SYS_ADMIN, CAP_MKNOD, CAP_SETFCAP = 18, 21, 27, 31

#: To serve files of any owner.
FILE_OWNERSHIP = frozenset({CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_SETGID, CAP_SETUID})

#: For virtiofsd to set up its own namespaces; it then drops all but FILE_OWNERSHIP.
VIRTIOFSD = FILE_OWNERSHIP | {CAP_DAC_READ_SEARCH, CAP_SETPCAP, CAP_SYS_CHROOT, CAP_SYS_ADMIN, CAP_MKNOD, CAP_SETFCAP}

#: For a supervisor to start and end all of these processes.
SUPERVISOR = VIRTIOFSD | {CAP_KILL, CAP_NET_BIND_SERVICE}


class Confinement(Record):
    """The limits of a process: its ``capabilities``, if its parent has them, and its largest file in bytes (or None).

    ``writable``: directories that stay writable when mounts are made read-only; None leaves the mounts unchanged.
    ``set_id_bits``: whether it may set them.  ``mount_namespace``: a descriptor of the one to run in.
    """

    capabilities: frozenset[int] = frozenset()
    file_size: int | None = None
    writable: Sequence[Path] | None = None
    set_id_bits: bool = False
    mount_namespace: int | None = None

    def apply(self) -> None:
        """Confine this process, a child that is about to exec.  Raises OSError if the kernel does not support it."""
        libc = ctypes.CDLL(None, use_errno=True)
        parent = os.getppid()
        _check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        if os.getppid() != parent:
            os._exit(1)  # it died before the line above
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self.mount_namespace is not None:
            _check(libc.setns(self.mount_namespace, CLONE_NEWNS))
        if self.file_size is not None:
            _lower(resource.RLIMIT_FSIZE, self.file_size)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails: no reason to end a VM
        if self.writable is not None:
            with contextlib.suppress(OSError):  # not root, or in a container: it cannot change mounts
                _own_mounts(libc, self.writable)
        _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        limit_capabilities(self.capabilities, libc)
        if not self.set_id_bits and (program := set_id_filter(os.uname().machine)):
            _install_filter(libc, program)

    def preexec(self) -> Callable[[], None]:
        """Return ``apply`` for subprocess, with its imports done: a child of fork(2) should not import."""
        ctypes.CDLL(None, use_errno=True)
        return self.apply


def confine_parent(capabilities: frozenset[int]) -> None:
    """Confine a process that starts confined ones: no new privileges, these capabilities, no core dump."""
    libc = ctypes.CDLL(None, use_errno=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    limit_capabilities(capabilities, libc)


def limit_capabilities(keep: frozenset[int], libc: ctypes.CDLL | None = None) -> None:
    """Drop all other capabilities, also those that a later exec could grant.  Raises OSError."""
    libc = libc or ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    number = 0
    while libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0) >= 0:
        if number not in keep:
            # Not permitted without CAP_SETPCAP: but exec grants none then, as no_new_privs is set.
            libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
        number += 1
    header = struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    _check(libc.capget(header, data))
    words = struct.unpack("=6I", data.raw)  # effective, permitted, inheritable, twice
    mask = [sum(1 << bit % 32 for bit in keep if bit // 32 == half) for half in (0, 1)]
    found = [words[3 * half + 1] & mask[half] for half in (0, 1)]
    _check(libc.capset(header, struct.pack("=6I", found[0], found[0], 0, found[1], found[1], 0)))


def _own_mounts(libc: ctypes.CDLL, writable: Sequence[Path]) -> None:
    """Enter a mount namespace in which only ``writable`` can be written to.  Raises OSError."""
    _check(libc.unshare(CLONE_NEWNS))
    # A slave: what the host unmounts is unmounted here, too.
    _check(libc.mount(None, b"/", None, MS_REC | MS_SLAVE, None))
    for path in writable:
        _check(libc.mount(os.fsencode(path), os.fsencode(path), None, MS_BIND | MS_REC, None))
    _set_read_only(libc, Path("/"), True)
    for path in writable:
        _set_read_only(libc, path, False)


def _set_read_only(libc: ctypes.CDLL, path: Path, read_only: bool) -> None:
    attributes = struct.pack("=4Q", *((MOUNT_ATTR_RDONLY, 0) if read_only else (0, MOUNT_ATTR_RDONLY)), 0, 0)
    words = (SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(path), AT_RECURSIVE, attributes, ctypes.c_size_t(32))
    _check(libc.syscall(*words))


# The filter of system calls: those with a mode fail with EPERM if it has a set-ID bit.  Those that pass a mode in
# memory, which a filter cannot read, fail with ENOSYS: programs then use others.

LD_ABS, JEQ, JGE, JSET, RET = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x00050000 | 1, 0x00050000 | 38
S_ISUID_OR_S_ISGID = 0o6000
X32 = 0x40000000

#: By machine: AUDIT_ARCH, which argument of a system call is the mode, and the calls that fail with ENOSYS.
OPENAT2, IO_URING_SETUP, FCHMODAT2 = 437, 425, 452
SYSTEM_CALLS = {
    "x86_64": (
        0xC000003E,
        # open creat chmod fchmod mknod mkdir, openat mkdirat mknodat fchmodat
        {2: 2, 85: 1, 90: 1, 91: 1, 133: 1, 83: 1, 257: 3, 258: 2, 259: 2, 268: 2, FCHMODAT2: 2},
        (OPENAT2, IO_URING_SETUP),
    ),
    # fchmod fchmodat openat mkdirat mknodat
    "aarch64": (0xC00000B7, {52: 1, 53: 2, 56: 3, 34: 2, 33: 2, FCHMODAT2: 2}, (OPENAT2, IO_URING_SETUP)),
}


def set_id_filter(machine: str) -> bytes:
    """Return the seccomp program that prevents setting set-ID bits; empty for an unknown machine."""
    if machine not in SYSTEM_CALLS:
        return b""
    audit_arch, with_mode, refused = SYSTEM_CALLS[machine]
    program = [(LD_ABS, 0, 0, 4), (JEQ, 1, 0, audit_arch), (RET, 0, 0, KILL), (LD_ABS, 0, 0, 0)]
    if machine == "x86_64":
        program += [(JGE, 0, 1, X32), (RET, 0, 0, ENOSYS)]
    for number in refused:
        program += [(JEQ, 0, 1, number), (RET, 0, 0, ENOSYS)]
    for number, place in with_mode.items():
        program += [
            (JEQ, 0, 4, number),
            (LD_ABS, 0, 0, 16 + 8 * place),  # the lower half: little-endian
            (JSET, 0, 1, S_ISUID_OR_S_ISGID),
            (RET, 0, 0, EPERM),
            (RET, 0, 0, ALLOW),
        ]
    program.append((RET, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *each) for each in program)


def _install_filter(libc: ctypes.CDLL, program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    _check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0))


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _check(result: int) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))

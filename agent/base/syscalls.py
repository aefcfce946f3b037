"""System calls that Python does not wrap, by ctypes.  Errors are OSError, as for the functions of `os`.

ctypes is imported by the first call (or by `preload`): an agent that never calls them does not pay for it.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ctypes
    from typing import Any

# syscall numbers; those above 423 are the same on all architectures (the others: x86_64, aarch64)
_MACHINE = os.uname().machine
_NUMBERS = {
    "x86_64": {"bpf": 321, "finit_module": 313, "pivot_root": 155, "sched_setattr": 314, "statx": 332},
    "aarch64": {"bpf": 280, "finit_module": 273, "pivot_root": 41, "sched_setattr": 274, "statx": 291},
}  # fmt: skip
RT_SIGTIMEDWAIT = {"x86_64": 128, "aarch64": 137}.get(_MACHINE, -1)
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 428, 429, 430, 431, 432
_OPENAT2, _PIDFD_GETFD = 437, 438

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
MS_REMOUNT, MS_NOATIME, MS_BIND, MS_MOVE, MS_REC = 0x20, 0x400, 0x1000, 0x2000, 0x4000
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 0x1, 0x2, 0x8
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 0x1, 0x2, 0x4, 0x8
MOUNT_ATTR_NOATIME, MOUNT_ATTR_STRICTATIME, MOUNT_ATTR__ATIME = 0x10, 0x20, 0x70  # the last is the mask of the others
MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_NOSYMFOLLOW = 0x80, 0x200000
CLONE_FS, CLONE_NEWTIME, CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x200, 0x80, 0x20000, 0x2000000, 0x4000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x8000000, 0x10000000, 0x20000000, 0x40000000
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT = 0x1, 0x2, 0x4, 0x8, 0x10
RESOLVE_CACHED = 0x20
AT_EMPTY_PATH, AT_STATX_DONT_SYNC, STATX_INO = 0x1000, 0x4000, 0x100
RB_AUTOBOOT, RB_POWER_OFF, RB_HALT_SYSTEM, RB_DISABLE_CAD = 0x01234567, 0x4321FEDC, 0xCDEF0123, 0

# capabilities(7), by number
CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
    "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)  # fmt: skip


def preload() -> None:
    """Import all that these functions need, so that a thread in a container's mount namespace imports nothing.

    A late import there would run code from the container's files (CVE-2019-14271).
    """
    import ctypes  # noqa: F401
    import struct  # noqa: F401

    _libc()


_loaded: list[ctypes.CDLL] = []


def _libc() -> ctypes.CDLL:
    if not _loaded:
        import ctypes

        library = ctypes.CDLL(None, use_errno=True)
        library.syscall.restype = ctypes.c_long
        _loaded.append(library)
    return _loaded[0]


def _check(result: int, what: str) -> int:
    if result < 0:
        import ctypes

        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
    return result


def _bytes(path: str | bytes | os.PathLike[str] | None) -> bytes | None:
    return None if path is None else os.fsencode(path)


def mount(
    source: str | None,
    target: str | os.PathLike[str],
    fstype: str | None = None,
    flags: int = 0,
    data: str | None = None,
) -> None:
    """Mount a file system: mount(2).  Raises OSError with the target as its file name."""
    import ctypes

    options = None if data is None else data.encode()
    result = _libc().mount(_bytes(source), _bytes(target), _bytes(fstype), ctypes.c_ulong(flags), options)
    _check(result, os.fspath(target))


def umount2(target: str | os.PathLike[str], flags: int = 0) -> None:
    """Unmount: umount2(2).  Raises OSError."""
    _check(_libc().umount2(_bytes(target), flags), os.fspath(target))


def swapon(path: str | os.PathLike[str], flags: int = 0) -> None:
    """Swap to a file or device: swapon(2).  Raises OSError."""
    _check(_libc().swapon(_bytes(path), flags), os.fspath(path))


def pivot_root(new: str, old: str) -> None:
    """Change the root of the processes in this mount namespace: pivot_root(2).  Raises OSError."""
    _check(_libc().syscall(_number("pivot_root"), new.encode(), old.encode()), "pivot_root")


def finit_module(fd: int, parameters: str = "") -> None:
    """Load a kernel module from an open file: finit_module(2).  Raises OSError."""
    result = _libc().syscall(_number("finit_module"), fd, parameters.encode(), 0)
    _check(result, "finit_module")


def openat2(dir_fd: int, path: str | os.PathLike[str], flags: int, resolve: int) -> int:
    """Open an existing file with resolve flags, close-on-exec: openat2(2).  Raises OSError."""
    import ctypes
    from struct import pack

    how = pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    result = _libc().syscall(_OPENAT2, dir_fd, _bytes(path), how, ctypes.c_size_t(len(how)))
    return _check(result, os.fspath(path))


def device_of(fd: int) -> int:
    """Return the device of a file, as st_dev, without contacting the server of its file system: statx(2).  Raises
    OSError.
    """
    import ctypes
    from struct import unpack_from

    found = ctypes.create_string_buffer(256)
    flags = AT_EMPTY_PATH | AT_STATX_DONT_SYNC
    _check(_libc().syscall(_NUMBERS[_MACHINE]["statx"], fd, b"", flags, STATX_INO, found), "statx")
    return os.makedev(*unpack_from("=II", found, 0x88))


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """Duplicate a descriptor of another process, close-on-exec: pidfd_getfd(2).  Raises OSError."""
    return _check(_libc().syscall(_PIDFD_GETFD, pidfd, fd, 0), "pidfd_getfd")


def fsopen(fstype: str) -> int:
    """Open a file system context, close-on-exec: fsopen(2).  Raises OSError."""
    return _check(_libc().syscall(_FSOPEN, fstype.encode(), 1), "fsopen")


def fsconfig(fd: int, key: str = "", value: str | None = None) -> None:
    """Configure a file system context: fsconfig(2).  No value: set a flag; no key: create.  Raises OSError."""
    command = (0 if value is None else 1) if key else 6  # FSCONFIG_SET_FLAG, _SET_STRING, _CMD_CREATE
    text = None if value is None else value.encode()
    _check(_libc().syscall(_FSCONFIG, fd, command, key.encode() or None, text, 0), key or "fsconfig")


def fsmount(fd: int, attributes: int = 0) -> int:
    """Create a detached mount of a file system context, close-on-exec: fsmount(2).  Raises OSError."""
    return _check(_libc().syscall(_FSMOUNT, fd, 1, attributes), "fsmount")


def open_tree(path: str | os.PathLike[str]) -> int:
    """Clone the mounts at and below a directory, close-on-exec: open_tree(2).  Raises OSError."""
    flags = 1 | 0x8000 | os.O_CLOEXEC  # OPEN_TREE_CLONE, AT_RECURSIVE
    return _check(_libc().syscall(_OPEN_TREE, -100, _bytes(path), flags), os.fspath(path))


def move_mount(mount_fd: int, point_fd: int) -> None:
    """Attach a mount to a directory or a file: move_mount(2).  Raises OSError."""
    empty_paths = 0x4 | 0x40  # MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH
    _check(_libc().syscall(_MOVE_MOUNT, mount_fd, b"", point_fd, b"", empty_paths), "move_mount")


def reboot(command: int) -> None:
    """Reboot, power off, or set Ctrl-Alt-Delete's effect, by one of RB_*: reboot(2).  Raises OSError."""
    import ctypes

    _check(_libc().reboot(ctypes.c_int(command - (1 << 32) if command >> 31 else command)), "reboot")


def setns(fd: int, flags: int) -> None:
    """Move the calling thread into a namespace: setns(2).  Raises OSError."""
    _check(_libc().setns(fd, flags), "setns")


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces: unshare(2).  Raises OSError."""
    _check(_libc().unshare(flags), "unshare")


def set_child_subreaper() -> None:
    """Adopt orphaned descendants of this process: prctl(2), PR_SET_CHILD_SUBREAPER.  Raises OSError."""
    _check(_libc().prctl(36, 1, 0, 0, 0), "prctl")


def sched_setattr(pid: int, attributes: bytes) -> None:
    """Set the scheduler of a process from a struct sched_attr: sched_setattr(2).  Raises OSError."""
    _check(_libc().syscall(_number("sched_setattr"), pid, attributes, 0), "sched_setattr")


def bpf(command: int, attributes: Any) -> int:
    """Call bpf(2); `attributes` is a ctypes buffer holding union bpf_attr.  Raises OSError."""
    import ctypes

    result = _libc().syscall(_number("bpf"), command, attributes, ctypes.c_uint(ctypes.sizeof(attributes)))
    return _check(result, "bpf")


def _number(name: str) -> int:
    try:
        return _NUMBERS[_MACHINE][name]
    except KeyError:
        raise OSError(38, f"the number of {name}(2) on {_MACHINE} is not known") from None

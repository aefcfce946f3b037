"""Names of capabilities and resource limits as OCI configurations spell them, by their kernel numbers."""

from __future__ import annotations

from caisson.agent.libcontainer.config.reader import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

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

# setrlimit(2), by number
RLIMITS = (
    "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_DATA", "RLIMIT_STACK", "RLIMIT_CORE", "RLIMIT_RSS", "RLIMIT_NPROC",
    "RLIMIT_NOFILE", "RLIMIT_MEMLOCK", "RLIMIT_AS", "RLIMIT_LOCKS", "RLIMIT_SIGPENDING", "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE", "RLIMIT_RTPRIO", "RLIMIT_RTTIME",
)  # fmt: skip

_CAPABILITY_BITS = {name: 1 << number for number, name in enumerate(CAPABILITIES)}
_RLIMIT_NUMBERS = {name: number for number, name in enumerate(RLIMITS)}


def capability_mask(names: Iterable[str], where: str) -> int:
    """Return the set as a bit mask.  Raises SpecError for an unknown name."""
    mask = 0
    for name in names:
        bit = _CAPABILITY_BITS.get(name)
        if bit is None:
            raise SpecError(where, f"{name!r} is not a capability")
        mask |= bit
    return mask


def rlimit_number(name: str, where: str) -> int:
    """Return the kernel's number of a limit.  Raises SpecError for an unknown name."""
    number = _RLIMIT_NUMBERS.get(name)
    if number is None:
        raise SpecError(where, f"{name!r} is not a resource limit")
    return number

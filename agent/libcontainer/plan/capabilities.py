"""Look up capabilities and resource limits by their names in OCI configurations."""

from __future__ import annotations

from caisson.agent.base.syscalls import CAPABILITIES
from caisson.agent.libcontainer.config.reader import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

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

"""The available CPUs, and how a configuration that names others is adjusted.

A configuration may be written for the CPUs of another machine: a VM has only as many as it was given.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.libcontainer.config.resources import Resources

ONLINE = "/sys/devices/system/cpu/online"

#: Largest sensible length of a list, and CPU number; the kernel's own limit is 8192 CPUs.
LONGEST, HIGHEST = 4096, 1 << 14


def numbers(text: str) -> frozenset[int] | None:
    """Parse a list of CPUs such as 0-3,7; None if it is invalid or absurd (cpuset(7), "List format")."""
    found: set[int] = set()
    if len(text) > LONGEST:
        return None
    for part in text.split(","):
        low, dash, high = part.partition("-")
        if not (low.isascii() and low.isdecimal()) or (dash and not (high.isascii() and high.isdecimal())):
            return None
        if int(high or low) < int(low) or int(high or low) > HIGHEST:
            return None
        found.update(range(int(low), int(high or low) + 1))
    return frozenset(found)


def online(file: str = ONLINE) -> str:
    """Read the online CPUs, as the kernel formats them."""
    with open(file, encoding="utf-8") as stream:  # noqa: PTH123 - no pathlib at start
        return stream.read().strip()


def available(resources: Resources, file: str = ONLINE) -> Resources:
    """Return the limits, with all available CPUs in place of a list that names unavailable ones.

    An invalid list is left for the kernel to reject.
    """
    wanted = numbers(resources.cpu.cpus) if resources.cpu.cpus else None
    if wanted is None:
        return resources
    there = online(file)
    if wanted <= (numbers(there) or frozenset()):
        return resources
    return resources.but(cpu=resources.cpu.but(cpus=there))

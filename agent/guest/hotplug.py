"""CPUs and memory that the host plugs in: the kernel sees them, and somebody has to switch them on.

Sources: Documentation/admin-guide/mm/memory-hotplug.rst, Documentation/core-api/cpu_hotplug.rst.
"""

from __future__ import annotations

import asyncio
import os

from caisson.agent.base.errors import Failed, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SYSTEM = "/sys/devices/system"

#: A CPU that was plugged in shows up within this many seconds, or not at all.
PATIENCE = 10.0
INTERVAL = 0.05  # sysfs has no event for what is there but off


async def online_cpus(count: int, system: str = SYSTEM) -> None:
    """Switch `count` CPUs on, waiting for those that are not there yet.  Raises Failed when there are fewer."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    done = 0
    while True:
        for switch in _off(f"{system}/cpu", "cpu"):
            if done < count and _switch_on(switch):
                done += 1
        if done >= count:
            return
        if loop.time() >= deadline:
            raise Failed(f"only {done} of {count} were connected")
        await asyncio.sleep(INTERVAL)


def online_memory(system: str = SYSTEM) -> None:
    """Switch on all memory that is off.  Raises Failed, naming the first block that would not."""
    refused = [switch for switch in _off(f"{system}/memory", "memory") if not _switch_on(switch)]
    if refused:
        raise Failed(f"Could not online memory: {refused[0]}")


def probe_memory(addresses: Iterable[int], system: str = SYSTEM) -> None:
    """Tell the kernel of memory at these physical addresses.  Raises Failed at the first that it does not take."""
    for address in addresses:
        try:
            with open(f"{system}/memory/probe", "w") as file:  # noqa: PTH123
                file.write(f"{address:#x}")
        except OSError as error:
            raise Failed(f"Could not probe memory at {address:#x}: {os.strerror(error.errno or 0).lower()}") from error


def check_count(count: int, cpu_only: bool) -> None:
    """Raises Refused for a request that asks for nothing."""
    if cpu_only and not count:
        raise Refused("requested number of CPUs '0' must be greater than 0")


def _off(directory: str, prefix: str) -> Iterator[str]:
    """The switches of what is off, in the order of their numbers."""
    try:
        names = os.listdir(directory)  # noqa: PTH208 - no pathlib at start
    except FileNotFoundError:
        return  # a kernel without hot-plug
    numbers = sorted(int(name.removeprefix(prefix)) for name in names if name.removeprefix(prefix).isdecimal())
    for number in numbers:
        switch = f"{directory}/{prefix}{number}/online"
        try:
            with open(switch) as file:  # noqa: PTH123
                if file.read().strip() == "0":
                    yield switch
        except OSError:
            continue  # it cannot be switched off, or has just been unplugged


def _switch_on(switch: str) -> bool:
    try:
        with open(switch, "w") as file:  # noqa: PTH123
            file.write("1")
    except OSError:
        return False
    return True

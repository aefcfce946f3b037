"""Bring hot-plugged CPUs and memory online.

Sources: Documentation/admin-guide/mm/memory-hotplug.rst, Documentation/core-api/cpu_hotplug.rst.
"""

from __future__ import annotations

import asyncio
import os

from caisson.agent.base.errors import MissingArgument, SystemCallFailed, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SYSTEM = "/sys/devices/system"

#: Seconds to wait for a hot-plugged CPU to appear.
CPU_TIMEOUT = 10.0
POLL_INTERVAL = 0.05  # sysfs has no event for a CPU that is present but offline


async def online_cpus(count: int, system: str = SYSTEM) -> None:
    """Bring `count` CPUs online, waiting for those not present yet.  Raises SystemCallFailed if there are fewer."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + CPU_TIMEOUT
    done = 0
    while True:
        for switch in _offline(f"{system}/cpu", "cpu"):
            if done < count and _bring_online(switch):
                done += 1
        if done >= count:
            return
        if loop.time() >= deadline:
            raise SystemCallFailed(f"only {done} of {count} were connected")
        await asyncio.sleep(POLL_INTERVAL)


async def online_total(total: int, system: str = SYSTEM) -> None:
    """Bring CPUs online until `total` are online.  Raises SystemCallFailed."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + CPU_TIMEOUT
    while (online := _count_online(f"{system}/cpu/online")) < total:
        for switch in list(_offline(f"{system}/cpu", "cpu"))[: total - online]:
            _bring_online(switch)
        online = _count_online(f"{system}/cpu/online")
        if online < total:
            if loop.time() >= deadline:
                raise SystemCallFailed(f"only {online} of {total} CPUs are online")
            await asyncio.sleep(POLL_INTERVAL)


def _count_online(file: str) -> int:
    """Count the CPUs of a list such as "0-2,5"."""
    try:
        with open(file) as stream:  # noqa: PTH123
            text = stream.read().strip()
    except OSError:
        return 0
    ends = (part.partition("-") for part in text.split(",") if part)
    return sum(int(last or first) - int(first) + 1 for first, _, last in ends)


def online_memory(system: str = SYSTEM) -> None:
    """Bring all offline memory blocks online.  Raises SystemCallFailed, naming the first block that failed."""
    refused = [switch for switch in _offline(f"{system}/memory", "memory") if not _bring_online(switch)]
    if refused:
        raise SystemCallFailed(f"Could not online memory: {refused[0]}")


def probe_memory(addresses: Iterable[int], system: str = SYSTEM) -> None:
    """Probe for memory at these physical addresses.  Raises SystemCallFailed at the first that the kernel rejects."""
    for address in addresses:
        try:
            with open(f"{system}/memory/probe", "w") as file:  # noqa: PTH123
                file.write(f"{address:#x}")
        except OSError as error:
            raise SystemCallFailed(f"Could not probe memory at {address:#x}: {reason(error)}") from error


def check_count(count: int, cpu_only: bool) -> None:
    """Check a request for CPUs.  Raises MissingArgument if the count is 0."""
    if cpu_only and not count:
        raise MissingArgument("requested number of CPUs '0' must be greater than 0")


def _offline(directory: str, prefix: str) -> Iterator[str]:
    """Yield the `online` files of offline devices, in the order of their numbers."""
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
            continue  # it has no such file, or was just unplugged


def _bring_online(switch: str) -> bool:
    try:
        with open(switch, "w") as file:  # noqa: PTH123
            file.write("1")
    except OSError:
        return False
    return True

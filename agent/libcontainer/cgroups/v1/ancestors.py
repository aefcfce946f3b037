"""What cgroup v1 requires of a cgroup's ancestors: enough CPUs and real-time bandwidth to hand down."""

from __future__ import annotations

import os

from caisson.agent.libcontainer.cgroups import files
from caisson.agent.libcontainer.cgroups.cpuset import numbers

CPUSET = ("cpuset.cpus", "cpuset.mems")


def fill_cpuset(above: str, directory: str) -> None:
    """Give a new cgroup its parent's CPUs and memory nodes; without any, no process can join.

    Raises OSError.
    """
    for name in CPUSET:
        if not os.path.exists(f"{directory}/{name}"):  # noqa: PTH110 - no pathlib at start
            continue  # a kernel without the files of v1
        if not files.read(f"{directory}/{name}").strip():
            files.write(f"{directory}/{name}", files.read(f"{above}/{name}").strip())


def chain(root: str, directory: str) -> list[str]:
    """List the cgroups between the root and `directory`, the topmost first, both excluded."""
    names = directory.removeprefix(f"{root}/").split("/")[:-1]
    return [f"{root}/{'/'.join(names[: depth + 1])}" for depth in range(len(names))]


def widen_cpuset(root: str, directory: str, name: str, value: str) -> None:
    """Give all the root's CPUs to ancestors that have fewer than requested: CPUs may be hot-plugged.

    Raises OSError.
    """
    wanted = numbers(value)
    for above in chain(root, directory):
        has = numbers(files.read(f"{above}/{name}").strip())
        if wanted is not None and has is not None and not wanted <= has:
            files.write(f"{above}/{name}", files.read(f"{root}/{name}").strip())


def raise_realtime(root: str, directory: str, runtime: int | None, period: int | None) -> None:
    """Raise each ancestor's real-time runtime to the sum of its children's, with `runtime` for `directory`.

    Microseconds, relative to each one's own period; None leaves a value unchanged.  Raises OSError.
    """
    above = chain(root, directory)
    if not os.path.exists(f"{directory}/cpu.rt_runtime_us"):  # noqa: PTH110 - no pathlib at start
        return
    own = [int(files.read(f"{directory}/cpu.rt_{name}_us")) for name in ("runtime", "period")]
    share = max(runtime or own[0], 0) / (period or own[1])
    wanted = []
    inner = directory
    for outer in reversed(above):
        share += sum(_share(f"{outer}/{name}") for name in os.listdir(outer) if f"{outer}/{name}" != inner)  # noqa: PTH208
        wanted.append((outer, share))
        inner = outer
    for outer, total in reversed(wanted):
        if total > _share(outer):
            period = int(files.read(f"{outer}/cpu.rt_period_us"))
            files.write(f"{outer}/cpu.rt_runtime_us", str(-int(-total * period // 1)))


def _share(directory: str) -> float:
    try:
        return int(files.read(f"{directory}/cpu.rt_runtime_us")) / int(files.read(f"{directory}/cpu.rt_period_us"))
    except OSError:
        return 0.0

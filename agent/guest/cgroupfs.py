"""The cgroup file systems of a guest: version 2, or the hierarchies of version 1; and the agent's protection in them.

favordynmods (Linux 6.0) saves a process a grace period of about 15 ms when it joins a cgroup.
Sources: cgroup-v2.rst, cgroup-v1/cgroups.rst (Documentation/admin-guide), cgroups(7).
"""

from __future__ import annotations

import os

from caisson.agent.base import syscalls
from caisson.agent.base.syscalls import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REMOUNT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

CGROUPS = "/sys/fs/cgroup"

#: The cgroup of the agent and its helpers, and the parent of all containers' cgroups.
AGENT, CONTAINERS = "agent", "containers"

#: Bytes of memory protected for the agent, and tasks reserved for the guest.
AGENT_MEMORY = 64 << 20
RESERVED_TASKS = 256

#: The agent's CPU weight, against a container's 100: it needs little, but promptly.
AGENT_WEIGHT = 1000

#: The kernel counts epoll watches per user, and a container's root is the agent's user: one container could use them
#: all (epoll(7)).  Their memory is charged to the container anyway.
WATCHES = "/proc/sys/fs/epoll/max_user_watches"
MAX_WATCHES = 1 << 40
FLAGS = MS_NOSUID | MS_NODEV | MS_NOEXEC

#: Controllers that conventionally share a hierarchy.
CO_MOUNTED = (("cpu", "cpuacct"), ("net_cls", "net_prio"))


def mount_v2() -> None:
    """Mount cgroup v2, with every controller delegated.  Raises OSError."""
    _mount("cgroup2", CGROUPS, "nsdelegate")
    with open(f"{CGROUPS}/cgroup.controllers") as file:  # noqa: PTH123 - no pathlib at start
        controllers = file.read().split()
    with open(f"{CGROUPS}/cgroup.subtree_control", "w") as file:  # noqa: PTH123
        file.write(" ".join(f"+{name}" for name in controllers))


def mount_v1() -> None:
    """Mount every cgroup v1 hierarchy of the kernel, with links for controllers that share one.

    Controllers without v1 support in this kernel (memory and cpuset since Linux 6.12, unless configured) are missing,
    and requests for their limits fail with an error.  Raises OSError.
    """
    syscalls.mount("tmpfs", CGROUPS, "tmpfs", FLAGS, "mode=755,size=64k")
    with open("/proc/cgroups") as lines:  # noqa: PTH123
        groups = hierarchies(lines)
    for controllers in groups:
        name = ",".join(controllers)
        directory = f"{CGROUPS}/{name}"
        os.mkdir(directory)  # noqa: PTH102
        try:
            _mount("cgroup", directory, name)
        except OSError:
            os.rmdir(directory)  # noqa: PTH106
            continue
        if len(controllers) > 1:
            for controller in controllers:
                os.symlink(name, f"{CGROUPS}/{controller}")  # noqa: PTH211
    syscalls.mount(None, CGROUPS, None, MS_REMOUNT | MS_BIND | MS_RDONLY | FLAGS)


def protect_agent() -> None:
    """Reserve memory, CPUs, tasks and watches for the agent, and protect it from the OOM killer.

    Must be called while the process is small and has no threads: memory is charged where it was first used.  Raises
    OSError.
    """
    _write("/proc/self/oom_score_adj", "-1000")
    _write(WATCHES, str(MAX_WATCHES))
    for root in (CGROUPS, f"{CGROUPS}/pids"):
        try:
            os.mkdir(f"{root}/{CONTAINERS}")  # noqa: PTH102
            _write(f"{root}/{CONTAINERS}/pids.max", str(max(RESERVED_TASKS, _most_tasks() - RESERVED_TASKS)))
        except OSError:  # the other cgroup version, or a kernel without the pids controller
            continue
    try:
        os.mkdir(f"{CGROUPS}/{AGENT}")  # noqa: PTH102
        _write(f"{CGROUPS}/{AGENT}/memory.min", str(AGENT_MEMORY))
        _write(f"{CGROUPS}/{AGENT}/cpu.weight", str(AGENT_WEIGHT))
        _write(f"{CGROUPS}/{AGENT}/cgroup.procs", "0")
    except OSError:  # not in version 1
        pass


def _most_tasks() -> int:
    """Return the maximum number of processes and threads (proc_sys_kernel(5))."""
    found = []
    for name in ("threads-max", "pid_max"):
        with open(f"/proc/sys/kernel/{name}") as file:  # noqa: PTH123
            found.append(int(file.read()))
    return min(found)


def _write(path: str, value: str) -> None:
    with open(path, "w") as file:  # noqa: PTH123
        file.write(value)


def hierarchies(lines: Iterable[str]) -> list[tuple[str, ...]]:
    """Read the controllers of /proc/cgroups that are enabled, in the groups that they are mounted in."""
    rows = [line.split() for line in lines if not line.startswith("#")]
    there = [row[0] for row in rows if len(row) == 4 and row[3] == "1"]
    groups = [group for group in CO_MOUNTED if set(group) <= set(there)]
    taken = {name for group in groups for name in group}
    return [*groups, *((name,) for name in there if name not in taken)]


def _mount(kind: str, directory: str, options: str) -> None:
    try:
        syscalls.mount(kind, directory, kind, FLAGS, f"{options},favordynmods")
    except OSError:  # an older kernel
        syscalls.mount(kind, directory, kind, FLAGS, options)

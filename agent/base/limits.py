"""Limits on open files: high for the agent, which holds several per process, and the usual ones for containers.

Source: getrlimit(2).  The kernel starts init with 1024, which three hundred processes with pipes exhaust.
"""

from __future__ import annotations

import resource

#: The hard limit that systemd gives services, which programs have come to expect.
CONTAINER_MAX = 1 << 19


def raise_open_files() -> tuple[int, int]:
    """Raise RLIMIT_NOFILE of this process to its maximum.  Return (soft, hard) for containers whose spec sets none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with open("/proc/sys/fs/nr_open") as file:  # noqa: PTH123 - no pathlib at start
            most = int(file.read())
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):  # without CAP_SYS_RESOURCE: up to the hard limit
        most = hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft, min(most, max(hard, CONTAINER_MAX))

"""How many files may be open: many for the agent, which holds some for every process; the usual number for containers.

Source: getrlimit(2).  A kernel starts init with 1024, which three hundred processes with pipes use up.
"""

from __future__ import annotations

import resource

#: The hard limit that systemd gives services, and so what programs have come to expect.
CONTAINER_MAX = 1 << 19


def raise_open_files() -> tuple[int, int]:
    """Raise this process's limit as far as it goes.  Returns (soft, hard) for containers whose spec has no opinion."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with open("/proc/sys/fs/nr_open") as file:  # noqa: PTH123 - no pathlib at start
            most = int(file.read())
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):  # not allowed to (CAP_SYS_RESOURCE): as far as the hard limit
        most = hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft, min(most, max(hard, CONTAINER_MAX))

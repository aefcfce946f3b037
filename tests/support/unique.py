"""Give unique names to what a test creates on the machine, so that it never meets another run's, or leftovers."""

from __future__ import annotations

import secrets
from pathlib import Path

_TOKEN = secrets.token_hex(6)

#: A command that runs until its container or cgroup is killed, with arguments that no other process has.
SLEEP = f"sleep {10**9 + secrets.randbelow(10**9)}"


def unique(name: str) -> str:
    """Return a name unique to this session, for a cgroup or a directory below /run."""
    return f"{name}-{_TOKEN}"


def sleepers() -> list[int]:
    """Return the pids of processes that run SLEEP."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:  # it has exited
            continue
        if line.rstrip(b"\0").split(b"\0") == SLEEP.encode().split():
            found.append(int(path.parent.name))
    return found

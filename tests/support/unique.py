"""Name what a test makes on the machine like nothing else there: another run's, or what an interrupted one has left."""

from __future__ import annotations

import secrets
from pathlib import Path

_TOKEN = secrets.token_hex(6)

#: A command that ends at the end of its container or group, and whose words no other process has.
SLEEP = f"sleep {10**9 + secrets.randbelow(10**9)}"


def unique(name: str) -> str:
    """Return a name for this session: of a cgroup, a directory below /run."""
    return f"{name}-{_TOKEN}"


def sleepers() -> list[int]:
    """Return the processes that run SLEEP."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if line.rstrip(b"\0").split(b"\0") == SLEEP.encode().split():
            found.append(int(path.parent.name))
    return found

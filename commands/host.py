"""What is about this machine and this command line."""

from __future__ import annotations

import sys

from caisson.commands.completion import SCRIPTS


def completion(*, shell: str) -> None:
    """Print a shell's completion."""
    sys.stdout.write(SCRIPTS[shell])

"""The entry point of the OCI command line `caisson-oci`, as a function of this package.

The installed command does not use it: it is a script that starts an interpreter with only what the command needs
(commands/caisson-oci).
"""

from __future__ import annotations

import sys

from caisson.agent.runtime.main import main as run


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run())

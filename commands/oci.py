"""The entry of the OCI command line `caisson-oci`, where it is called as a function of this package.

The installed command does not come by here: it is a script that starts an interpreter with nothing but what the command
needs (commands/caisson-oci).
"""

from __future__ import annotations

import sys

from caisson.agent.runtime.main import main as run


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run())

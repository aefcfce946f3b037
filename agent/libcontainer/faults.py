"""Points at which a command may be killed, so that a test can have it killed there (tests/native/oci_driver.py).

Those of nsexec are in agent/nsexec/faults.h.  A leaf, for whatever changes the state of a container.
"""

from __future__ import annotations


def reach(point: str) -> None:
    """Do nothing: only a test puts another function in this one's place."""

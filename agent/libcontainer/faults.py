"""Points at which a test can have a command killed (tests/native/oci_driver.py).

nsexec's are in agent/nsexec/faults.h.  A leaf module, for all code that changes a container's state.
"""

from __future__ import annotations


def reach(point: str) -> None:
    """Do nothing; tests replace this function."""

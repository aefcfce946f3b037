"""cgroups: what a container may use, how much it has used, and what is in it.

`v2` and `v1` are two implementations of the interface in `base`; callers need not know which.  `find` returns the
requested one.  v2 is the common case and imported with this package, v1 is not.
"""

from __future__ import annotations

import os

from caisson.agent.libcontainer.cgroups.base import Cgroup, CgroupError, Hierarchy
from caisson.agent.libcontainer.cgroups.v2.cgroup import HierarchyV2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.libcontainer.waits import Waits

__all__ = ["Cgroup", "CgroupError", "Hierarchy", "HierarchyV2", "find", "of_host"]


def find(
    version: str = "v2", parent: str = "", waits: Waits | None = None, *, bounded: bool = False
) -> Hierarchy | None:
    """Find the cgroups of this machine, "v1" or "v2"; None if there are none.

    All are created below the cgroup `parent`.  With `bounded`, a container may nest only a few cgroups in its own
    (version 2).
    """
    if version == "v2":
        return HierarchyV2.find(parent, waits=waits, bounded=bounded)
    from caisson.agent.libcontainer.cgroups.v1.cgroup import HierarchyV1

    return HierarchyV1.find(parent, waits=waits)


def of_host() -> Hierarchy | None:
    """Find all cgroup hierarchies that the host uses: v2 alone, or those of v1 with v2 beside them."""
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):  # noqa: PTH110 - no pathlib at start
        return HierarchyV2.find()
    from caisson.agent.libcontainer.cgroups.v1.cgroup import HierarchyV1

    return HierarchyV1.find(every=True) or HierarchyV2.find()

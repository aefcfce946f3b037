"""cgroups: what a container may use, how much it has used, and what is in it.

`v2` and `v1` are two implementations of the interface in `base`; whoever uses one need not know which.  `find` gives
the one that was asked for.  v2 is the rule and imported with this package, v1 is not.
"""

from __future__ import annotations

from caisson.agent.libcontainer.cgroups.base import Cgroup, CgroupError, Hierarchy
from caisson.agent.libcontainer.cgroups.v2.cgroup import CgroupV2

__all__ = ["Cgroup", "CgroupError", "CgroupV2", "Hierarchy", "find"]


def find(version: str = "v2", parent: str = "") -> Hierarchy | None:
    """The cgroups of this machine, "v1" or "v2"; None where there are none.  All are made below the cgroup `parent`."""
    if version == "v2":
        return CgroupV2.find(parent)
    from caisson.agent.libcontainer.cgroups.v1.cgroup import CgroupV1

    return CgroupV1.find(parent)

"""What a host asks for, fitted to this guest: its CPUs are others than the host's, and its disks are its own."""

from __future__ import annotations

from caisson.agent.guest.rootdisk import root_disks
from caisson.agent.libcontainer.cgroups.cpuset import available
from caisson.agent.libcontainer.config.resources import DeviceRule

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.libcontainer.config.resources import Resources


def fit(resources: Resources) -> Resources:
    """The limits with CPUs that there are, and with device rules, if any, that end in a ban of the guest's disks.

    Making nodes of them stays allowed, as it is for any device: a node that cannot be opened does no harm.
    """
    fitted = available(resources)
    if not fitted.devices:
        return fitted  # nothing but what every container may use
    bans = tuple(DeviceRule(False, "b", major, minor, "rw") for major, minor in root_disks())
    return fitted.but(devices=(*fitted.devices, *bans))

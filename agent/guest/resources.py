"""Adapt a host's requests to this guest: its CPUs differ from the host's, and its disks are its own."""

from __future__ import annotations

from caisson.agent.base.errors import SystemCallFailed, reason
from caisson.agent.guest.rootdisk import root_disks
from caisson.agent.libcontainer.cgroups.cpuset import available
from caisson.agent.libcontainer.config.resources import DeviceRule
from caisson.agent.libcontainer.plan.sysctl import needed_namespace, path_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from caisson.agent.libcontainer.config.resources import Resources
    from caisson.agent.libcontainer.config.spec import Spec


def fit(resources: Resources) -> Resources:
    """Return the limits with existing CPUs only, and with device rules, if any, that end by denying the guest's disks.

    Creating nodes for them stays allowed, as for any device: a node that cannot be opened is harmless.
    """
    fitted = available(resources)
    if not fitted.devices:
        return fitted  # only what every container may use
    bans = tuple(DeviceRule(False, "b", major, minor, "rw") for major, minor in root_disks())
    return fitted.but(devices=(*fitted.devices, *bans))


def take_network_parameters(spec: Spec) -> tuple[Spec, dict[str, str]]:
    """Split off the network's kernel parameters if the network is the guest's: all containers of a pod share it.

    Returns the spec without them, and their values by path below /proc/sys.  Raises SpecError.
    """
    if any(namespace.type == "network" for namespace in spec.linux.namespaces):
        return spec, {}
    paths = {key: path_of(key) for key in spec.linux.sysctl}
    network = {path: spec.linux.sysctl[key] for key, path in paths.items() if needed_namespace(path) == "network"}
    if not network:
        return spec, {}
    rest = {key: value for key, value in spec.linux.sysctl.items() if paths[key] not in network}
    return spec.but(linux=spec.linux.but(sysctl=rest)), network


def set_parameters(values: Mapping[str, str]) -> None:
    """Write kernel parameters, by path below /proc/sys.  Raises SystemCallFailed."""
    for path, value in values.items():
        try:
            with open(f"/proc/sys/{path}", "w") as file:  # noqa: PTH123 - no pathlib at start
                file.write(value)
        except OSError as error:
            raise SystemCallFailed(f"sysctl {path}={value}: {reason(error)}") from error

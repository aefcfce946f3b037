"""Host devices of a container: found in the guest, where their numbers differ.

A configuration has the host's numbers.  The device at a container's path gets the guest's, and so does every cgroup
rule with the host's: by an index built first, as a number freed by one device and taken by another would be changed
twice.
"""

from __future__ import annotations

import os
import stat

from caisson.agent.base.errors import InvalidArgument, SystemCallFailed, reason
from caisson.agent.guest import modules
from caisson.agent.guest.blockdevices import BlockDevices
from caisson.agent.guest.storage import MODULES
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from caisson.agent.libcontainer.config.spec import Spec

TYPES = ("mmioblk", "blk", "blk-ccw", "scsi", "nvdimm")


class GuestDevice(Record):
    """A device of CreateContainer: its name (`id`, or `vm_path`), and its path in the container."""

    id: str
    type: str
    vm_path: str
    container_path: str


async def assign_device_numbers(spec: Spec, wanted: Sequence[GuestDevice], blocks: BlockDevices) -> Spec:
    """Return the configuration with the guest's device numbers.

    Raises InvalidArgument, SystemCallFailed or DeviceTimeout.
    """
    import asyncio

    numbers: dict[str, tuple[str, int, int]] = {}
    for device in wanted:
        _check(device)
        await asyncio.to_thread(modules.load_available, MODULES.get(device.type, ()))
        numbers[device.container_path] = _numbers_of(await _node(device, blocks))
    return _renumbered(spec, numbers) if numbers else spec


def _check(device: GuestDevice) -> None:
    what = device.id or device.vm_path or device.container_path
    if not device.type:
        raise InvalidArgument(f"invalid type for device {what}")
    if not device.id and not device.vm_path:
        raise InvalidArgument(f"invalid ID and VM path for device {what}")
    if not device.container_path:
        raise InvalidArgument(f"invalid container path for device {what}")
    if device.type not in TYPES:
        raise InvalidArgument(f'Unknown device type "{device.type}"')
    if device.type == "mmioblk" and not device.vm_path:
        raise InvalidArgument("Invalid path for virtioMmioBlkDevice")


async def _node(device: GuestDevice, blocks: BlockDevices) -> str:
    """Return its node in the guest's /dev, once it exists."""
    if device.type == "nvdimm":
        return await blocks.pmem(device.vm_path)
    if device.type == "scsi":
        return await blocks.scsi(device.id)
    if device.type == "blk-ccw":
        return await blocks.ccw(device.id)
    if device.type == "blk" and not device.vm_path:
        return await blocks.pci(device.id)
    return device.vm_path


def _numbers_of(node: str) -> tuple[str, int, int]:
    try:
        status = os.stat(node)  # noqa: PTH116 - no pathlib at start
    except OSError as error:
        raise SystemCallFailed(f"stat {node}: {reason(error)}") from error
    kind = "b" if stat.S_ISBLK(status.st_mode) else "c" if stat.S_ISCHR(status.st_mode) else ""
    if not kind:
        raise SystemCallFailed(f"{node} is not a device")
    return kind, os.major(status.st_rdev), os.minor(status.st_rdev)


def _renumbered(spec: Spec, numbers: Mapping[str, tuple[str, int, int]]) -> Spec:
    if not spec.linux.devices:
        raise SystemCallFailed("No devices found from the spec, cannot update")
    renumbered: dict[tuple[str, int, int], tuple[str, int, int]] = {}
    devices = []
    for device in spec.linux.devices:
        found = numbers.get(device.path)
        if found is not None:
            renumbered[device.type, device.major, device.minor] = found
            device = device.but(type=found[0], major=found[1], minor=found[2])
        devices.append(device)
    missing = numbers.keys() - {device.path for device in devices}
    if missing:
        raise SystemCallFailed(f"Should have found a matching device {min(missing)} in the spec")
    resources = spec.linux.resources
    if resources is not None:
        rules = []
        for rule in resources.devices:
            major, minor = (-1 if number is None else number for number in (rule.major, rule.minor))
            now = renumbered.get((rule.type, major, minor))
            rules.append(rule if now is None else rule.but(type=now[0], major=now[1], minor=now[2]))
        resources = resources.but(devices=tuple(rules))
    return spec.but(linux=spec.linux.but(devices=tuple(devices), resources=resources))

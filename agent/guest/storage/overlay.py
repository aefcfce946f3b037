"""Roots of several layers: overlayfs over existing directories, and over disks mounted for it (erofs).

Source: Documentation/filesystems/overlayfs.rst.  Options that begin with ``io.katacontainers.`` or ``X-kata.`` are from
the host to the agent, not for the file system.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from caisson.agent.base.errors import InvalidArgument, Unsupported
from caisson.agent.guest.storage import mounts
from caisson.agent.guest.storage.storages import Storage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Find = Callable[[Storage], Awaitable[str]]
    Mount = Callable[[Storage], Awaitable[None]]

#: Where a container's own directories are: writable layers, and layers mounted for it.
BUNDLES = "/run/kata-containers"

CREATE_DIRECTORY = "io.katacontainers.volume.overlayfs.create_directory"
WRITABLE = "io.katacontainers.fs-opt.overlay-rw"
AGENT_OPTION_PREFIXES = ("io.katacontainers.", "X-kata.")

UPPER, LOWER = "X-kata.overlay-upper", "X-kata.overlay-lower"
MAKE_DIRECTORY = "X-kata.mkdir.path"
PARTITION = "X-kata.partition-number"
VERITY = "X-kata.dmverity"


def prepare(storage: Storage, container_id: str) -> Storage:
    """Create the directories that an overlay needs; returns the storage to mount.

    Raises InvalidArgument or SystemCallFailed.
    """
    for given in storage.driver_options:
        name, _, path = given.partition("=")
        if name == CREATE_DIRECTORY:
            mounts.make_directory(path)
    options = _plain(storage.options)
    if WRITABLE in storage.options:
        if not container_id:
            raise InvalidArgument(f"storage {storage.mount_point}: {WRITABLE} is for containers alone")
        for name in ("upper", "work"):
            mounts.make_directory(f"{BUNDLES}/{container_id}/{name}")
            options = (*options, f"{name}dir={BUNDLES}/{container_id}/{name}")
    return storage.but(source=storage.source or "overlay", fstype="overlay", options=options)


class Layers:
    """The disks of one root: a writable one, and read-only ones below it, the uppermost first."""

    def __init__(self, storages: Sequence[Storage], container_id: str) -> None:
        """Raises InvalidArgument or Unsupported."""
        self.upper = next((one for one in storages if _is(one, UPPER, "ext4")), None)
        self.lower = [one for one in storages if one is not self.upper and _is(one, LOWER, "erofs")]
        self._base = f"{BUNDLES}/{container_id or 'sandbox'}/multi-layer"
        where = storages[0].mount_point
        if self.upper is None or not self.lower or len(self.lower) + 1 != len(storages):
            raise InvalidArgument(f"storage {where}: a root of layers needs one writable layer and some below it")
        if any(option.startswith(VERITY) for one in storages for option in one.options):
            raise Unsupported(f"storage {where}: layers with dm-verity are not supported by this agent")
        self.mount_point = self.upper.mount_point

    async def mount(
        self, node: Callable[[Storage], Awaitable[str]], mount: Callable[[Storage], Awaitable[None]]
    ) -> None:
        """Mount the layers, and their overlay on the mount point.

        ``node`` finds the device of a layer, and ``mount`` mounts one and registers it for unmounting.
        """
        assert self.upper is not None
        upper, lower = f"{self._base}/upper", [f"{self._base}/lower-{number}" for number in range(len(self.lower))]
        await mount(self._layer(self.upper, await node(self.upper), upper))
        for layer, place in zip(self.lower, lower, strict=True):
            await mount(self._layer(layer, await node(layer), place, "ro"))
        for option in self.upper.options:
            name, _, path = option.partition("=")
            if name == MAKE_DIRECTORY:
                path = path.partition(":")[0].replace("{{ mount 0 }}", upper).replace("{{ mount 1 }}", lower[0])
                if not path.startswith((f"{upper}/", f"{lower[0]}/")):
                    raise InvalidArgument(f"{MAKE_DIRECTORY}: {path!r} is not in a layer")
                mounts.make_directory(path)
        for name in ("upper", "work"):
            mounts.make_directory(f"{upper}/{name}")
        options = (f"lowerdir={':'.join(lower)}", f"upperdir={upper}/upper", f"workdir={upper}/work")
        await mount(Storage("overlayfs", "overlay", "overlay", self.mount_point, options))

    @staticmethod
    def _layer(layer: Storage, device: str, place: str, *more: str) -> Storage:
        return layer.but(source=device, mount_point=place, options=(*_plain(layer.options), *more))


def partition(storage: Storage, device: str, sysfs: str = "/sys/class/block") -> str:
    """Return the node of the partition that a layer names, or the disk itself.  Raises InvalidArgument."""
    number = mounts.option(storage.options, PARTITION)
    if not number:
        return device
    disk = device.rpartition("/")[2]
    with ExitStack() as stack:
        for name in os.listdir(f"{sysfs}/{disk}"):  # noqa: PTH208 - no pathlib at start
            try:
                file = stack.enter_context(open(f"{sysfs}/{disk}/{name}/partition"))  # noqa: PTH123
            except OSError:
                continue
            if file.read().strip() == number:
                return f"{device.removesuffix(disk)}{name}"
    raise InvalidArgument(f"{device}: there is no partition {number}")


def _is(storage: Storage, mark: str, fstype: str) -> bool:
    marked = [option.partition("=")[0] for option in storage.options]
    return mark in marked or (UPPER not in marked and LOWER not in marked and storage.fstype == fstype)


def _plain(options: Sequence[str]) -> tuple[str, ...]:
    return tuple(option for option in options if not option.startswith(AGENT_OPTION_PREFIXES))

"""Storages mounted for the host, reference-counted by mount point: several containers of a pod may use one.

Mounting can take as long as the host takes to respond, so it happens in threads.
"""

from __future__ import annotations

import asyncio
import errno
import time

from caisson.agent.base.errors import (
    DeviceTimeout,
    InvalidArgument,
    SystemCallFailed,
    UnknownStorageDriver,
    Unsupported,
)
from caisson.agent.base.mountinfo import mount_points
from caisson.agent.guest import modules
from caisson.agent.guest.storage import mounts
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from caisson.agent.base.log import Log
    from caisson.agent.guest.blockdevices import BlockDevices
    from caisson.agent.guest.storage.watchable import Watched

#: Drivers, with the kernel modules that they need.
MODULES: dict[str, tuple[str, ...]] = {
    "9p": ("9pnet_virtio", "9p"),
    "virtio-fs": ("virtiofs",),
    "blk": ("virtio_blk",),
    "blk-ccw": (),
    "mmioblk": ("virtio_blk",),
    "scsi": ("virtio_scsi", "sd_mod"),
    "nvdimm": ("virtio_pmem", "nd_pmem"),
    "overlayfs": ("overlay",),
    "erofs.multi-layer": ("virtio_blk", "overlay"),
    "ephemeral": (),
    "local": (),
    "watchable-bind": (),
}
DRIVERS = tuple(MODULES)

#: Drivers of storages that live until the sandbox ends: a restarted container finds its files again.
SANDBOX_SCOPED = ("ephemeral", "local")

#: The tag of a Kata host's share; an image, or a hypervisor's service, may already have mounted it.
SHARED_DIRECTORY = "kataShared"

#: Drivers whose source is the tag of a share, and the errors for a tag that does not exist (yet).
SHARES = ("9p", "virtio-fs")
UNKNOWN_TAG = (errno.EINVAL, errno.ENOENT)
POLL_INTERVAL = 0.02

#: A driver option that would need a key service in the guest.
ENCRYPTION = "encryption_key"


class FsGroup(Record):
    """The group that a storage's files must belong to; ``only_on_mismatch``: only if the root's differs."""

    gid: int
    only_on_mismatch: bool = False


class Storage(Record):
    """One of CreateContainer's or CreateSandbox's; what ``source`` means depends on the driver.

    A ``shared`` one stays until the sandbox ends.
    """

    driver: str
    source: str
    fstype: str
    mount_point: str
    options: tuple[str, ...] = ()
    driver_options: tuple[str, ...] = ()
    group: FsGroup | None = None
    shared: bool = False


class _Point:
    """One mount point: its reference count, and the actions to undo it when that drops to zero."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0
        self.lasting = False
        self.mounted: list[str] = []  # in order
        self.directories: list[str] = []
        self.watched: Watched | None = None


class Storages:
    """All mount points of a sandbox, and their users."""

    def __init__(self, devices: BlockDevices, log: Log, hotplug_timeout: float = 0.0) -> None:
        """A share being plugged in is awaited for ``hotplug_timeout`` seconds."""
        self._devices = devices
        self._hotplug_timeout = hotplug_timeout
        self._log = log
        self._points: dict[str, _Point] = {}

    async def mount(self, storages: Sequence[Storage], container_id: str = "") -> list[str]:
        """Mount all of them, in this order; returns the mount points that `unmount` is to release.

        One already in use is counted, not mounted again.  Raises InvalidArgument, MissingArgument,
        SystemCallFailed, Unsupported or Timeout; all but permanent ones are then undone.
        """
        for storage in storages:
            self._check(storage)
        done: list[str] = []
        try:
            for group in _group_layers(storages):
                await self._use(group, container_id)
                done.append(group[0].mount_point)
        except BaseException:
            await self.unmount(done)
            raise
        return done

    @staticmethod
    def _check(storage: Storage) -> None:
        if storage.driver not in DRIVERS and storage.fstype != "bind":
            raise UnknownStorageDriver(driver=storage.driver)
        if any(option.startswith(ENCRYPTION) for option in storage.driver_options):
            raise Unsupported(f"storage {storage.mount_point}: encrypted volumes are not supported by this agent")

    async def _use(self, group: Sequence[Storage], container_id: str) -> None:
        first = group[0]
        while True:
            point = self._points.setdefault(first.mount_point, _Point())
            async with point.lock:
                if self._points.get(first.mount_point) is not point:
                    continue  # its last user removed it meanwhile
                if not point.users:
                    try:
                        await self._make(group, point, container_id)
                    except BaseException:
                        await self._undo(point)
                        del self._points[first.mount_point]
                        raise
                point.users += 1
                if (first.shared or first.driver in SANDBOX_SCOPED) and not point.lasting:
                    point.lasting = True
                    point.users += 1  # the sandbox itself
                return

    async def _make(self, group: Sequence[Storage], point: _Point, container_id: str) -> None:
        storage = group[0]
        names = [*MODULES.get(storage.driver, ()), *(one.fstype for one in group)]  # a file system's has its name
        await asyncio.to_thread(modules.load_available, names)
        if len(group) > 1 or storage.driver == "erofs.multi-layer":
            await self._make_layers(group, point, container_id)
        elif storage.fstype == "bind" and storage.driver != "watchable-bind":
            await self._mount(point, storage)
        elif storage.driver in SANDBOX_SCOPED:
            await self._make_lasting(point, storage)
        elif storage.driver == "watchable-bind":
            from caisson.agent.guest.storage.watchable import Watched

            point.watched = Watched(storage.source, storage.mount_point, self._log)
            await point.watched.start()
        elif storage.driver == "overlayfs":
            from caisson.agent.guest.storage.overlay import BUNDLES, WRITABLE, prepare

            if WRITABLE in storage.options:
                point.directories += [f"{BUNDLES}/{container_id}/{name}" for name in ("upper", "work")]
            await self._mount(point, await asyncio.to_thread(prepare, storage, container_id))
        elif storage.driver not in SHARES:
            await self._mount(point, storage.but(source=await self._source(storage)))
        elif storage.source != SHARED_DIRECTORY or storage.mount_point.rstrip("/") not in mount_points("/run"):
            await self._mount_share(point, storage)
        if storage.group is not None:
            from caisson.agent.guest.storage.ownership import give_to_group

            read_only = "ro" in storage.options
            await asyncio.to_thread(give_to_group, storage.mount_point, storage.group, read_only=read_only)

    async def _make_lasting(self, point: _Point, storage: Storage) -> None:
        from caisson.agent.guest.storage.ephemeral import make_ephemeral, make_local

        if storage.driver == "local":
            point.directories.append(storage.mount_point)
            await asyncio.to_thread(make_local, storage)
        else:
            await self._mount(point, storage, make_ephemeral)
            point.directories.append(storage.mount_point)

    async def _make_layers(self, group: Sequence[Storage], point: _Point, container_id: str) -> None:
        from caisson.agent.guest.storage.overlay import BUNDLES, Layers, partition

        layers = Layers(group, container_id)
        point.directories.append(f"{BUNDLES}/{container_id or 'sandbox'}/multi-layer")

        async def node(layer: Storage) -> str:
            return partition(layer, await self._disk(layer))

        await layers.mount(node, lambda layer: self._mount(point, layer))

    async def _mount(self, point: _Point, storage: Storage, mount: Callable[[Storage], None] = mounts.mount) -> None:
        """Mount in a thread, to completion: a cancelled caller would otherwise leave a mount behind."""
        work = asyncio.ensure_future(asyncio.to_thread(mount, storage))
        try:
            await asyncio.shield(work)
        finally:
            await asyncio.wait([work])
            if work.exception() is None:
                point.mounted.append(storage.mount_point)

    async def _mount_share(self, point: _Point, storage: Storage) -> None:
        """Mount a share of the host.  Before Linux 6.9 there is no event for a new tag.

        Raises SystemCallFailed, or DeviceTimeout if the tag does not appear.
        """
        deadline = time.monotonic() + self._hotplug_timeout
        while True:
            try:
                return await self._mount(point, storage)
            except SystemCallFailed as error:
                cause = error.__cause__
                if not isinstance(cause, OSError) or cause.errno not in UNKNOWN_TAG:
                    raise
                if time.monotonic() > deadline:
                    raise DeviceTimeout(device=storage.source, seconds=self._hotplug_timeout) from error
            await asyncio.sleep(POLL_INTERVAL)

    async def _source(self, storage: Storage) -> str:
        """Return the device, or other source to mount.  Raises InvalidArgument or Timeout."""
        if storage.driver == "mmioblk":
            return await self._devices.wait_for_node(storage.source)
        if storage.driver == "nvdimm":
            return await self._devices.pmem(storage.source)
        if storage.driver == "scsi":
            return await self._devices.scsi(storage.source)
        if storage.driver == "blk-ccw":
            return await self._devices.ccw(storage.source)
        return await self._disk(storage)

    async def _disk(self, storage: Storage) -> str:
        if storage.source.startswith("/dev"):
            return self._devices.node(storage.source)
        return await self._devices.pci(storage.source)

    async def unmount(self, mount_points: Sequence[str]) -> None:
        """Release mount points, the last one first; those no longer used are unmounted.

        A failure is logged, and the others are still unmounted.
        """
        for path in reversed(mount_points):
            point = self._points.get(path)
            if point is None:
                continue
            async with point.lock:
                point.users -= 1
                if not point.users:
                    await self._undo(point)
                    self._points.pop(path, None)

    async def resize(self, storages: Sequence[Storage]) -> None:
        """Change the options of tmpfs mounts.  Raises InvalidArgument or SystemCallFailed."""
        from caisson.agent.guest.storage.ephemeral import resize

        for storage in storages:
            if storage.driver != "ephemeral":
                raise InvalidArgument(f"Unsupported storage type {storage.driver}: only ephemeral ones can be updated")
            await asyncio.to_thread(resize, storage)

    async def release(self) -> None:
        """Unmount permanent storages, at the end of the sandbox."""
        await self.unmount([path for path, point in self._points.items() if point.lasting])

    async def _undo(self, point: _Point) -> None:
        if point.watched is not None:
            await point.watched.stop()
        for path in reversed(point.mounted):
            try:
                await asyncio.to_thread(mounts.unmount, path)
            except OSError as error:
                self._log("error", "a storage could not be unmounted", mount_point=path, error=str(error))
                return  # then its directory is not ours to remove
        if point.directories:
            import shutil  # late: it imports much, and a sandbox ends once

            for path in point.directories:
                await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)


def _group_layers(storages: Sequence[Storage]) -> list[list[Storage]]:
    """Group the layers of one root, at the position of the first of them; all others stay separate."""
    groups: list[list[Storage]] = []
    layers: list[Storage] = []
    for storage in storages:
        if storage.driver == "erofs.multi-layer" or "X-kata.multi-layer=true" in storage.options:
            if not layers:
                groups.append(layers)
            layers.append(storage)
        else:
            groups.append([storage])
    return groups

"""Storages: what the host has mounted in the guest before a container (or all of a sandbox) uses it.

Mount points lie where containers may have been able to write, so no symbolic link is followed on the way to one
(openat2(2), RESOLVE_NO_SYMLINKS), and it is mounted on, and let go of, by its descriptor.  Mounting can take as long as
the host takes to answer: it happens in threads.
"""

from __future__ import annotations

import asyncio
import os
import stat

from caisson.agent.base import syscalls
from caisson.agent.base.errors import InvalidArgument, MissingArgument, SystemCallFailed, UnknownStorageDriver
from caisson.agent.base.record import Record
from caisson.agent.guest import modules
from caisson.agent.guest.blockdevices import BlockDevices

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from caisson.agent.base.log import Log

#: Words of fstab(5) that are flags of mount(2); all others are for the file system.
FLAGS = {
    "ro": 0x1, "nosuid": 0x2, "nodev": 0x4, "noexec": 0x8, "sync": 0x10, "remount": 0x20, "mand": 0x40,
    "dirsync": 0x80, "noatime": 0x400, "nodiratime": 0x800, "bind": 0x1000, "rbind": 0x5000, "silent": 0x8000,
    "acl": 0x10000, "relatime": 0x200000, "iversion": 0x800000, "strictatime": 0x1000000, "lazytime": 0x2000000,
    "rw": 0, "defaults": 0,
}  # fmt: skip
PROPAGATION = {
    "unbindable": 1 << 17, "private": 1 << 18, "slave": 1 << 19, "shared": 1 << 20,
    "runbindable": 1 << 17 | 0x4000, "rprivate": 1 << 18 | 0x4000, "rslave": 1 << 19 | 0x4000,
    "rshared": 1 << 20 | 0x4000,
}  # fmt: skip
NAMED_BY_A_TAG = ("9p", "virtiofs", "tmpfs", "hugetlbfs")
#: Of the kernel, for what a driver is about.
MODULES = {
    "9p": ("9pnet_virtio", "9p"),
    "virtio-fs": ("virtiofs",),
    "blk": ("virtio_blk",),
    "mmioblk": ("virtio_blk",),
    "scsi": ("virtio_scsi", "sd_mod"),
    "nvdimm": ("virtio_pmem", "nd_pmem"),
}
HUGE_PAGES = "/sys/kernel/mm/hugepages"
DRIVERS = ("9p", "virtio-fs", "blk", "blk-ccw", "mmioblk", "scsi", "ephemeral", "local", "nvdimm")


class Storage(Record):
    """One of CreateContainer's or CreateSandbox's; what `source` means depends on the driver."""

    driver: str
    source: str
    fstype: str
    mount_point: str
    options: tuple[str, ...] = ()


class Storages:
    """What is mounted.  Those of the drivers ephemeral and local are shared by the sandbox, and stay until its end."""

    def __init__(self, devices: BlockDevices, log: Log) -> None:
        self._devices = devices
        self._log = log
        self._shared: dict[str, Storage] = {}
        self._lock = asyncio.Lock()  # for the shared ones

    async def mount(self, storages: Sequence[Storage]) -> list[str]:
        """Mount all of them, in this order; returns the mount points that `unmount` is to let go of.

        Raises InvalidArgument, SystemCallFailed or Timeout; nothing of them is left then, but what is shared.
        """
        for storage in storages:
            if storage.driver not in DRIVERS and storage.fstype != "bind":
                raise UnknownStorageDriver(driver=storage.driver)
        done: list[str] = []
        try:
            for storage in storages:
                if storage.driver in ("ephemeral", "local") and storage.fstype != "bind":
                    await self._share(storage)
                else:
                    await asyncio.to_thread(modules.need, MODULES.get(storage.driver, ()), storage.fstype)
                    source = await self._source(storage)
                    work = asyncio.ensure_future(asyncio.to_thread(_mount, storage.but(source=source)))
                    try:
                        await asyncio.shield(work)
                    finally:  # a thread cannot be broken off: whoever has gone leaves a mount otherwise
                        await asyncio.wait([work])
                        if work.exception() is None:
                            done.append(storage.mount_point)
        except BaseException:
            await self.unmount(done)
            raise
        return done

    async def _source(self, storage: Storage) -> str:
        """The device, or whatever else is mounted.  Raises InvalidArgument or Timeout."""
        source = storage.source
        if storage.fstype == "bind" or storage.driver in ("9p", "virtio-fs", "mmioblk"):
            return source
        if storage.driver == "nvdimm":
            return await self._devices.pmem(source)
        if storage.driver == "scsi":
            return await self._devices.scsi(source)
        if storage.driver == "blk-ccw":
            return await self._devices.ccw(source)
        if source.startswith("/dev"):
            return self._devices.node(source)
        return await self._devices.pci(source)

    async def _share(self, storage: Storage) -> None:
        async with self._lock:
            if storage.mount_point in self._shared:
                return
            await asyncio.to_thread(_make_local if storage.driver == "local" else _make_ephemeral, storage)
            self._shared[storage.mount_point] = storage

    async def unmount(self, mount_points: Sequence[str]) -> None:
        """Let go of mounts, the last one first.  What cannot be let go of is logged: the others are all the same."""
        for path in reversed(mount_points):
            try:
                await asyncio.to_thread(_unmount, path)
            except OSError as error:
                self._log("error", "a storage could not be unmounted", mount_point=path, error=str(error))

    async def release(self) -> None:
        """Let go of what is shared, at the end of the sandbox."""
        async with self._lock:
            shared = list(self._shared.values())
            self._shared.clear()
        await self.unmount([one.mount_point for one in shared if one.driver == "ephemeral"])
        import shutil  # here: it imports much, and a sandbox ends once

        for one in shared:
            await asyncio.to_thread(shutil.rmtree, one.mount_point, ignore_errors=True)


def open_point(path: str, mode: int, *, directory: bool = True) -> int:
    """An O_PATH descriptor of a mount point, made with the directories around it where it is missing.

    Raises OSError; ELOOP where there is a symbolic link on the way.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not path.startswith("/") or not parts or ".." in parts:
        raise OSError(22, os.strerror(22), path)
    at = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for number, name in enumerate(parts):
        last = number == len(parts) - 1
        is_file = last and not directory
        try:
            try:
                if is_file:
                    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=at))
                else:
                    os.mkdir(name, mode if last else 0o755, dir_fd=at)
                    if last:
                        os.chmod(name, mode, dir_fd=at, follow_symlinks=True)
            except FileExistsError:
                pass
            flags = os.O_PATH | (0 if is_file else os.O_DIRECTORY)
            inner = syscalls.openat2(at, name, flags, resolve=syscalls.RESOLVE_NO_SYMLINKS)
        finally:
            os.close(at)
        at = inner
    return at


def _mount(storage: Storage) -> None:
    source, target, fstype = storage.source, storage.mount_point, storage.fstype
    for value, what in ((source, "source"), (target, "destination"), (fstype, "FS type")):
        if not value:
            raise MissingArgument(f"need mount {what}")
    flags, propagation, data = _options(storage.options)
    if fstype == "bind":
        flags |= FLAGS["bind"]
    if fstype not in NAMED_BY_A_TAG and source.startswith("/"):
        try:
            source = os.path.realpath(source, strict=True)
        except OSError:
            raise SystemCallFailed(f"Could not resolve symlink for source {source}") from None
    directory = fstype != "bind" or os.path.isdir(source)  # noqa: PTH112 - no pathlib at start
    try:
        point = open_point(target, 0o755, directory=directory)
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()
        raise SystemCallFailed(f"Could not create destination mount point: {target}: {why}") from error
    place = f"/proc/self/fd/{point}"
    try:
        syscalls.mount(source, place, fstype, flags & ~(FLAGS["ro"] if flags & FLAGS["bind"] else 0), data or None)
        try:
            _finish(target, flags, propagation)
        except OSError:
            _unmount(target)
            raise
    except OSError as error:
        raise SystemCallFailed(
            f"Could not mount {source} to {target}: {os.strerror(error.errno or 0).lower()}"
        ) from error
    finally:
        os.close(point)


def _finish(target: str, flags: int, propagation: list[int]) -> None:
    """What takes a call of its own: attributes of a bind mount, and propagation (mount(2), "Notes")."""
    attributes = flags & (FLAGS["ro"] | FLAGS["nosuid"] | FLAGS["nodev"] | FLAGS["noexec"])
    if not (propagation or (flags & FLAGS["bind"] and attributes)):
        return
    mounted = open_point(target, 0o755, directory=os.path.isdir(target))  # noqa: PTH112
    try:
        place = f"/proc/self/fd/{mounted}"
        if flags & FLAGS["bind"] and attributes:
            syscalls.mount(None, place, None, syscalls.MS_REMOUNT | syscalls.MS_BIND | attributes)
        for kind in propagation:
            syscalls.mount(None, place, None, kind)
    finally:
        os.close(mounted)


def _unmount(path: str) -> None:
    """Let go of what is mounted on a path.  Raises OSError."""
    mounted = open_point(path, 0o755, directory=stat.S_ISDIR(os.lstat(path).st_mode))
    try:
        syscalls.umount2(f"/proc/self/fd/{mounted}", syscalls.MNT_DETACH)
    finally:
        os.close(mounted)


def _options(options: Sequence[str]) -> tuple[int, list[int], str]:
    flags, propagation, data = 0, [], []
    for option in options:
        if option in FLAGS:
            flags |= FLAGS[option]
        elif option in PROPAGATION:
            propagation.append(PROPAGATION[option])
        elif option:
            data.append(option)
    return flags, propagation, ",".join(data)


def _value(options: Sequence[str], name: str) -> str:
    return next((option.partition("=")[2] for option in options if option.partition("=")[0] == name), "")


def _make_local(storage: Storage) -> None:
    """A directory of the guest, with the mode that an option gives it."""
    text = _value(storage.options, "mode") or "0777"
    try:
        mode = int(text, 8)
        os.close(open_point(storage.mount_point, mode & 0o7777))
    except ValueError:
        raise InvalidArgument(f"storage {storage.mount_point}: mode={text} is not an octal number") from None
    except OSError as error:
        raise SystemCallFailed(
            f"Could not create {storage.mount_point}: {os.strerror(error.errno or 0).lower()}"
        ) from error


def _make_ephemeral(storage: Storage) -> None:
    """A tmpfs, or huge pages of which as many are set aside as the options say."""
    if storage.fstype == "hugetlbfs":
        _set_huge_pages_aside(storage)
    try:
        os.close(open_point(storage.mount_point, 0o777))
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()
        raise SystemCallFailed(f"Could not create destination mount point: {storage.mount_point}: {why}") from error
    _mount(storage.but(source=storage.source or storage.fstype))


def _set_huge_pages_aside(storage: Storage) -> None:
    size, page = (_value(storage.options, name) for name in ("size", "pagesize"))
    if not (size.isdecimal() and page.isdecimal() and int(page) >= 1024):
        raise InvalidArgument(f"storage {storage.mount_point}: hugetlbfs needs size=BYTES and pagesize=BYTES")
    file = f"{HUGE_PAGES}/hugepages-{int(page) // 1024}kB/nr_hugepages"
    try:
        with open(file, "w") as pages:  # noqa: PTH123 - a sysfs file
            pages.write(str(int(size) // int(page)))
    except OSError as error:
        raise SystemCallFailed(f"{file}: {os.strerror(error.errno or 0).lower()}") from error

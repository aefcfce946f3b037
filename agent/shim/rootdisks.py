"""Root file systems in image files, which the guest mounts itself: the files are plugged into its VM as disks.

The host's kernel reads no file system of a guest then, and the guest needs no share for its root.
Source: containerd, plugins/snapshots/blockfile/blockfile.go (mounts) and plugins/snapshots/erofs/erofs.go
(overlayMounts).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from caisson.agent.pods.machines import MachineError, NoPort
from caisson.agent.shim.mounts import MAKE_DIRECTORY, RootfsMount
from caisson.proto.kata3 import agent_pb2
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.base.log import Log
    from caisson.agent.pods.machines import PodMachine

#: A container's own directory in the guest, where its root is mounted.
GUEST_DIRECTORY = "/run/kata-containers"

#: File systems in image files that the guest's kernel has.
GUEST_FSTYPES = ("ext4", "erofs")

#: The overlay above erofs layers.
OVERLAY = "format/mkdir/overlay"

#: The agent's driver for a root of layers, and its marks on their storages (agent/guest/storage/overlay.py).
LAYERS_DRIVER = "erofs.multi-layer"
UPPER, LOWER = "X-kata.overlay-upper", "X-kata.overlay-lower"

#: Options of mount(8) and of containerd about the loop device that a host would need.
LOOP_OPTIONS = ("loop", "direct-io")

#: Options that name further devices, or have the host verify the file: no guest could mount it alone.
HOST_OPTIONS = ("device=", "X-containerd.")

LOOP_DEVICES = Path("/sys/block")


class NotOnDisks(Exception):
    """A root file system that has to be mounted by the host; the text says why."""


class RootDisk(Record):
    """An image file, and how to mount it."""

    file: Path
    fstype: str
    options: tuple[str, ...]
    writable: bool
    layer: str = ""  # UPPER or LOWER, of a root of several


class RootDisks:
    """The disks of one container's root, in its pod's VM.  Methods block."""

    def __init__(self, machine: PodMachine, container_id: str, log: Log) -> None:
        self._machine = machine
        self._log = log
        self._names: list[str] = []
        self._prefix = f"root-{hashlib.sha256(container_id.encode()).hexdigest()[:16]}"
        self.mount_point = f"{GUEST_DIRECTORY}/{container_id}/rootfs"

    @property
    def plugged(self) -> bool:
        """Whether the root is on disks."""
        return bool(self._names)

    def plug(self, mounts: Sequence[RootfsMount]) -> list[agent_pb2.Storage]:
        """Plug in a root's files, and return the storages for the agent; none if the host has to mount the root.

        Raises MachineError; nothing is plugged in then.
        """
        try:
            if not self._machine.block_roots:
                return []
            disks = root_disks(mounts)
            return [self._plug(disk, len(disks) - 1 - number) for number, disk in enumerate(disks)]
        except (NotOnDisks, NoPort) as error:
            self._log("info", "the root is shared, not a disk", reason=str(error))
        except MachineError:
            self.unplug()
            raise
        self.unplug()
        return []

    def _plug(self, disk: RootDisk, following: int) -> agent_pb2.Storage:
        name = f"{self._prefix}-{len(self._names)}"
        path = self._machine.add_disk(disk.file, name, writable=disk.writable, following=following)
        self._names.append(name)
        driver = LAYERS_DRIVER if disk.layer else "blk"
        options = [*disk.options, disk.layer] if disk.layer else disk.options
        return agent_pb2.Storage(
            driver=driver, source=path, fstype=disk.fstype, options=options, mount_point=self.mount_point
        )

    def unplug(self) -> None:
        """Unplug what is plugged in, once it is unmounted.  Idempotent."""
        while self._names:
            name = self._names.pop()
            try:
                if not self._machine.remove_disk(name):
                    self._log("warning", "the guest keeps a disk until its VM ends", disk=name)
            except MachineError:
                pass  # the VM has exited


def root_disks(mounts: Sequence[RootfsMount]) -> list[RootDisk]:
    """Return the image files that a root file system consists of: one, or a writable one and the layers below it.

    Raises NotOnDisks for mounts of other kinds, and for a file that the host has mounted: two kernels with one file
    system destroy it.
    """
    images = mounts if len(mounts) == 1 else mounts[:-1]
    if not images or not all(_is_image(mount) for mount in images) or (len(mounts) > 1 and not _is_overlay(mounts)):
        types = [mount.type for mount in mounts]
        raise NotOnDisks(f"{' + '.join(types) or 'a directory'}: not one of the blockfile or erofs kind")
    disks = [_disk(mount) for mount in images]
    for disk in disks:
        if disk.writable and os.path.realpath(disk.file) in _files_of_loop_devices():
            raise NotOnDisks(f"{disk.file}: is in use on the host, by a loop device")
    if len(mounts) == 1:
        return disks
    return [disks[0].but(layer=UPPER), *(disk.but(layer=LOWER) for disk in disks[1:])]


def _is_image(mount: RootfsMount) -> bool:
    """Return whether a mount is of an image file alone: none whose parts are in others, or are verified by the host."""
    if mount.type not in GUEST_FSTYPES or any(option.startswith(HOST_OPTIONS) for option in mount.options):
        return False
    try:
        return "loop" in mount.options and stat.S_ISREG(os.lstat(mount.source).st_mode)
    except OSError:
        return False


def _is_overlay(mounts: Sequence[RootfsMount]) -> bool:
    """Return whether the last mount is an overlay of all others, of which the first is the writable one."""
    upper, *layers, overlay = mounts
    if overlay.type != OVERLAY or upper.type != "ext4" or {mount.type for mount in layers} != {"erofs"}:
        return False
    lower = "{{ mount 1 }}" if len(layers) == 1 else f"{{{{ overlay 1 {len(layers)} }}}}"
    options = {option for option in overlay.options if not option.startswith(MAKE_DIRECTORY)}
    return options == {f"lowerdir={lower}", "upperdir={{ mount 0 }}/upper", "workdir={{ mount 0 }}/work"}


def _disk(mount: RootfsMount) -> RootDisk:
    options = tuple(option for option in mount.options if not option.startswith(LOOP_OPTIONS))
    return RootDisk(Path(mount.source), mount.type, options, "ro" not in options)


def _files_of_loop_devices() -> set[str]:
    found = set()
    for attribute in LOOP_DEVICES.glob("loop*/loop/backing_file"):
        try:
            found.add(attribute.read_text().rstrip("\n"))
        except OSError:
            pass  # just released
    return found

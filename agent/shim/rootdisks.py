"""Root file systems in image files, which the guest mounts itself: the files are plugged into its VM as disks.

The host's kernel reads no file system of a guest then, and the guest needs no share for its root.
Source: containerd, plugins/snapshots/blockfile/blockfile.go (mounts).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from caisson.agent.base.record import Record
from caisson.agent.pods.machines import MachineError, NoPort
from caisson.agent.shim.mounts import RootfsMount
from caisson.proto.kata3 import agent_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.base.log import Log
    from caisson.agent.pods.machines import PodMachine

#: A container's own directory in the guest, where its root is mounted.
GUEST_DIRECTORY = "/run/kata-containers"

#: File systems in image files that the guest's kernel has.
GUEST_FSTYPES = ("ext4",)

#: Options of mount(8) and of containerd about the loop device that a host would need.
OF_LOOP_DEVICES = ("loop", "direct-io", "X-containerd.")

LOOP_DEVICES = Path("/sys/block")


class NotOnDisks(Exception):
    """A root file system that has to be mounted by the host; the text says why."""


class RootDisk(Record):
    """An image file, and how to mount it."""

    file: Path
    fstype: str
    options: tuple[str, ...]
    writable: bool


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
            if not self._machine.takes_roots:
                return []
            return [self._plug(disk) for disk in root_disks(mounts)]
        except (NotOnDisks, NoPort) as error:
            self._log("info", "the root is shared, not a disk", reason=str(error))
        except MachineError:
            self.unplug()
            raise
        self.unplug()
        return []

    def _plug(self, disk: RootDisk) -> agent_pb2.Storage:
        name = f"{self._prefix}-{len(self._names)}"
        path = self._machine.add_disk(disk.file, name, writable=disk.writable)
        self._names.append(name)
        return agent_pb2.Storage(
            driver="blk", source=path, fstype=disk.fstype, options=disk.options, mount_point=self.mount_point
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
    """Return the image files that a root file system consists of.

    Raises NotOnDisks for mounts of other kinds, and for a file that the host has mounted: two kernels with one file
    system destroy it.
    """
    if len(mounts) != 1 or mounts[0].type not in GUEST_FSTYPES or not _has_image(mounts[0]):
        types = [mount.type for mount in mounts]
        raise NotOnDisks(f"{' + '.join(types) or 'a directory'}: not one of the blockfile kind")
    disk = _disk(mounts[0])
    if os.path.realpath(disk.file) in _files_of_loop_devices():
        raise NotOnDisks(f"{disk.file}: is in use on the host, by a loop device")
    return [disk]


def _has_image(mount: RootfsMount) -> bool:
    try:
        return "loop" in mount.options and stat.S_ISREG(os.lstat(mount.source).st_mode)
    except OSError:
        return False


def _disk(mount: RootfsMount) -> RootDisk:
    options = tuple(option for option in mount.options if not option.startswith(OF_LOOP_DEVICES))
    return RootDisk(Path(mount.source), mount.type, options, "ro" not in options)


def _files_of_loop_devices() -> set[str]:
    found = set()
    for attribute in LOOP_DEVICES.glob("loop*/loop/backing_file"):
        try:
            found.add(attribute.read_text().rstrip("\n"))
        except OSError:
            pass  # just released
    return found

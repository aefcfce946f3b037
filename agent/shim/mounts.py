"""A pod's shared directory: everything that its containers need from the host is bind-mounted below it.

The directory is a shared mount, so that later mounts propagate to virtiofsd, which has its own mount namespace.
Source: mount_namespaces(7), "Shared subtrees"; mount(8).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from caisson.agent.base import syscalls
from caisson.agent.base.mountinfo import mount_points

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.shim.spec import Volume

#: Seconds for mount(8).
MOUNT_TIMEOUT = 30.0


class MountError(Exception):
    """Something could not be mounted; the text is one line."""


class RootfsMount(Protocol):
    """A mount as containerd gives it (containerd.types.RootfsMount)."""

    @property
    def type(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def options(self) -> Sequence[str]: ...


def make_shared(directory: Path) -> None:
    """Make a directory a mount with shared propagation.  Raises MountError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        syscalls.mount(str(directory), directory, None, syscalls.MS_BIND)
        syscalls.mount(None, directory, None, syscalls.MS_SHARED)
    except OSError as error:
        raise MountError(f"{directory}: {(error.strerror or '').lower()}") from error


def mount_rootfs(mounts: Iterable[RootfsMount], bundle_rootfs: Path, place: Path, root: str) -> None:
    """Mount a container's root file system in its bundle, in order, and bind-mount it below the share.

    Without mounts it already exists at ``root`` (docker's graph drivers).  Raises MountError.
    """
    count = 0
    for mount in mounts:
        options = ["-o", ",".join(mount.options)] if mount.options else []
        _mount("-t", mount.type, *options, mount.source, str(bundle_rootfs))
        count += 1
    source = bundle_rootfs if count else bundle_rootfs.parent / root
    bind(source, place, recursive=True)


def bind(source: Path, place: Path, *, recursive: bool) -> None:
    """Bind-mount a directory or a file below the share.  Raises MountError."""
    try:
        if source.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        flags = syscalls.MS_BIND | (syscalls.MS_REC if recursive else 0)
        syscalls.mount(str(source), place, None, flags)
    except OSError as error:
        raise MountError(f"{source}: cannot be shared: {(error.strerror or '').lower()}") from error


def bind_volumes(volumes: Iterable[Volume], directory: Path) -> None:
    """Bind-mount a container's volumes below its directory in the share.  Raises MountError."""
    for volume in volumes:
        bind(Path(volume.source), directory / volume.name, recursive=volume.recursive)


def release(directory: Path) -> None:
    """Unmount everything at and below a directory, and remove the mount points.  No host files are removed.

    Idempotent.
    """
    for place in reversed(mount_points(str(directory))):
        detach(place)
    _remove_empty(directory)


def unmount_rootfs(bundle: Path) -> None:
    """Unmount what mount_rootfs mounted in a bundle.  Idempotent."""
    for place in reversed(mount_points(str(bundle / "rootfs"))):
        detach(place)


def detach(place: str) -> None:
    """Detach the top mount at a mount point, however busy, if there is one."""
    try:
        syscalls.umount2(place, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except OSError:
        pass


def _remove_empty(directory: Path) -> None:
    """Remove directories and empty files, without descending into mounts."""
    if not directory.is_dir() or mount_points(str(directory)):
        return
    for parent, directories, files in os.walk(directory, topdown=False):
        for name in files:
            if os.path.getsize(f"{parent}/{name}") == 0:  # noqa: PTH202
                os.unlink(f"{parent}/{name}")  # noqa: PTH108
        for name in directories:
            try:
                os.rmdir(f"{parent}/{name}")  # noqa: PTH106
            except OSError:
                pass
    try:
        directory.rmdir()
    except OSError:
        pass


def _mount(*words: str) -> None:
    import subprocess  # late: `delete` mounts nothing

    done = subprocess.run(
        ["mount", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=MOUNT_TIMEOUT
    )
    if done.returncode != 0:
        raise MountError(f"{words[-1]}: {' '.join(done.stderr.split())}")

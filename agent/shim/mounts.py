"""A pod's shared directory: everything that its containers need from the host is bind-mounted below it.

The directory is a shared mount, so that later mounts propagate to virtiofsd, which has its own mount namespace.
Source: mount_namespaces(7), "Shared subtrees"; mount(8).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from caisson.agent.base import syscalls
from caisson.agent.base.mountinfo import mount_points

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.shim.spec import Volume

#: The directory beside a bundle's root for the file systems that it is made of.
LAYERS = "layers"

#: References and options of containerd's mount manager, which it leaves to a shim that wants image files as they are.
REFERENCE = re.compile(r"\{\{ *(?:mount|overlay) (\d+)(?: (\d+))? *\}\}")
MAKE_DIRECTORY = "X-containerd.mkdir.path="
VERITY = "X-containerd.dmverity="

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


def mount_rootfs(mounts: Sequence[RootfsMount], bundle_rootfs: Path, place: Path, root: str) -> None:
    """Mount a container's root file system in its bundle, in order, and bind-mount it below the share.

    Without mounts it already exists at ``root`` (docker's graph drivers).  Raises MountError.
    """
    for mount in mounts:
        if any(option.startswith(VERITY) for option in mount.options):
            raise MountError(f'{mount.source}: dm-verity is not supported; set containerd\'s dmverity_mode = "off"')
    if any("/" in mount.type for mount in mounts):
        _mount_chain(mounts, bundle_rootfs.with_name(LAYERS), bundle_rootfs)
    else:
        for mount in mounts:
            _mount(mount.type, mount.options, mount.source, bundle_rootfs)
    bind(bundle_rootfs if mounts else bundle_rootfs.parent / root, place, recursive=True)


def _mount_chain(mounts: Sequence[RootfsMount], directory: Path, target: Path) -> None:
    """Mount a list in which later mounts name the mount points of earlier ones; all but the last below a directory.

    Source: containerd 2.2, docs/mounts.md.  Raises MountError.
    """
    for number, mount in enumerate(mounts):
        transforms = mount.type.split("/")
        fstype = transforms.pop()
        if unknown := set(transforms) - {"format", "mkdir"}:
            raise MountError(f"{mount.source}: mounts of type {mount.type} need containerd for {unknown.pop()}")
        source, *options = (_formatted(text, number) for text in (mount.source, *mount.options))
        for option in options:
            if option.startswith(MAKE_DIRECTORY):
                path, _, mode = option.removeprefix(MAKE_DIRECTORY).partition(":")
                _make_directory(directory / path, int(mode.partition(":")[0] or "700", 8))
        place = target if number == len(mounts) - 1 else directory / str(number)
        place.mkdir(parents=True, exist_ok=True)
        plain = [option for option in options if not option.startswith("X-containerd.")]
        _mount(fstype, plain, source, place, relative_to=directory)


def _make_directory(place: Path, mode: int) -> None:
    """Create a directory in a file system that a guest may have written: a link there could lead anywhere on the host.

    Raises MountError.
    """
    place.mkdir(mode=mode, exist_ok=True)
    if place.is_symlink():
        raise MountError(f"{place}: is a symbolic link")


def _formatted(text: str, count: int) -> str:
    """Replace references to the mount points of the ``count`` mounts before: relative ones, as overlayfs takes few
    bytes.  Raises MountError.
    """

    def points(found: re.Match[str]) -> str:
        first, last = int(found[1]), int(found[2] or found[1])
        if max(first, last) >= count:
            raise MountError(f"{text}: there are {count} mounts before it")
        step = 1 if last >= first else -1
        return ":".join(str(number) for number in range(first, last + step, step))

    formatted = REFERENCE.sub(points, text)
    if "{{" in formatted:
        raise MountError(f"{text}: unknown reference")
    return formatted


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
    for name in ("rootfs", LAYERS):
        for place in reversed(mount_points(str(bundle / name))):
            detach(place)


def detach(place: str) -> None:
    """Detach the top mount at a mount point, however busy, if there is one."""
    try:
        syscalls.umount2(place, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except OSError:
        pass


def _remove_empty(directory: Path) -> None:
    """Remove directories and empty files, without descending into mounts or through links."""
    if directory.is_symlink() or not directory.is_dir() or mount_points(str(directory)):
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


def _mount(fstype: str, options: Sequence[str], source: str, target: Path, *, relative_to: Path | None = None) -> None:
    import subprocess  # late: `delete` mounts nothing

    words = ["mount", "-t", fstype, *(["-o", ",".join(options)] if options else []), source, str(target)]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=MOUNT_TIMEOUT, cwd=relative_to
    )
    if done.returncode != 0:
        raise MountError(f"{target}: {' '.join(done.stderr.split())}")

"""Mount and unmount file systems inside running containers.

A mount is created detached in the guest, which has the device, and attached inside by its descriptor: the container
needs neither the device nor the privilege to mount.  A thread of the agent enters the mount namespace for one path, on
which no symbolic link is followed; it imports nothing there (CVE-2019-14271). Source: fsopen(2), fsmount(2),
move_mount(2), setns(2).
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time

from caisson.agent.base import syscalls
from caisson.agent.base.errors import FailedPrecondition, InvalidArgument, NotRunning, SystemCallFailed, Timeout, reason
from caisson.agent.guest import modules
from caisson.agent.guest.storage import MODULES, open_point
from caisson.agent.guest.storage.storages import POLL_INTERVAL, UNKNOWN_TAG
from caisson.agent.libcontainer.state import STOPPED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from caisson.agent.model.container import Container

#: Supported file systems (shares of the host by tag, and tmpfs) with the kernel modules they need.
KINDS: dict[str, tuple[str, ...]] = {"virtiofs": MODULES["virtio-fs"], "9p": MODULES["9p"], "tmpfs": ()}


class ContainerMounts:
    """Mounts made inside running containers, by source."""

    def __init__(self, container: Callable[[str], Container], timeout: float) -> None:
        """``container`` returns a container by id or raises NotFound; a tag is awaited for ``timeout`` seconds."""
        self._container = container
        self._timeout = timeout
        self._mounted: dict[str, list[tuple[Container, str]]] = {}

    async def mount(
        self, container_id: str, source: str, fstype: str, mount_point: str, options: Sequence[str]
    ) -> None:
        """Mount a file system, always nosuid and nodev; ``options`` are those of the file system, as for mount(8).

        Raises NotFound, InvalidArgument, FailedPrecondition, SystemCallFailed, or Timeout where no such tag appears.
        """
        if fstype not in KINDS:
            raise InvalidArgument(
                f"{fstype!r} cannot be mounted inside a container; file systems that can: {', '.join(KINDS)}"
            )
        container = self._container(container_id)
        await asyncio.to_thread(modules.load_available, KINDS[fstype])
        deadline = time.monotonic() + self._timeout
        while True:  # before Linux 6.9 there is no event for a new tag, so poll
            try:
                made = await asyncio.to_thread(_make, source, fstype, options)
                break
            except OSError as error:
                if error.errno == errno.ENODEV:
                    raise SystemCallFailed(f"Could not mount {source}: the guest's kernel has no {fstype}") from error
                if error.errno not in UNKNOWN_TAG or fstype == "tmpfs":
                    raise SystemCallFailed(f"Could not mount {source}: {reason(error)}") from error
                if time.monotonic() > deadline:
                    raise Timeout(f"Could not mount {source}: no device has this tag") from error
            await asyncio.sleep(POLL_INTERVAL)

        def attach() -> None:
            point = open_point(mount_point, 0o755)
            try:
                syscalls.move_mount(made, point)
            finally:
                os.close(point)

        try:
            await asyncio.to_thread(_inside, container, attach)
        except OSError as error:
            raise SystemCallFailed(
                f"Could not mount {source} on {mount_point} of {container_id}: {reason(error)}"
            ) from error
        finally:
            os.close(made)
        lasting = [one for one in self._mounted.get(source, ()) if one[0].status != STOPPED]
        self._mounted[source] = [*lasting, (container, mount_point)]

    async def unmount(self, source: str) -> None:
        """Unmount everything mounted from a source; does nothing if there is nothing.  Raises SystemCallFailed."""
        mounted = self._mounted.get(source, [])
        while mounted:
            container, mount_point = one = mounted[-1]

            def detach(mount_point: str = mount_point) -> None:
                parent, _, name = mount_point.rstrip("/").rpartition("/")
                at = open_point(parent, 0o755) if parent else os.open("/", os.O_PATH | os.O_CLOEXEC)
                try:
                    os.fchdir(at)  # only this thread's
                finally:
                    os.close(at)
                syscalls.umount2(name, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)

            try:
                await asyncio.to_thread(_inside, container, detach)
            except FailedPrecondition:
                pass  # it has exited, and its mounts with it
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT):  # already unmounted from inside
                    raise SystemCallFailed(
                        f"Could not unmount {mount_point} of {container.id}: {reason(error)}"
                    ) from error
            if one in mounted:  # concurrent calls
                mounted.remove(one)


def _make(source: str, fstype: str, options: Sequence[str]) -> int:
    """Create a detached mount; return its descriptor.  Raises OSError."""
    context = syscalls.fsopen(fstype)
    try:
        syscalls.fsconfig(context, "source", source)
        for option in options:
            name, equals, value = option.partition("=")
            syscalls.fsconfig(context, name, value if equals else None)
        syscalls.fsconfig(context)
        attributes = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
        return syscalls.fsmount(context, attributes | (syscalls.MOUNT_ATTR_RDONLY if "ro" in options else 0))
    finally:
        os.close(context)


def _inside(container: Container, work: Callable[[], None]) -> None:
    """Run a function in a container's mount namespace, at its root.

    Raises FailedPrecondition and what the function raises.
    """
    syscalls.preload()
    namespace = _namespace(container)
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            syscalls.unshare(syscalls.CLONE_FS)  # root and current directory of this thread alone
            syscalls.setns(namespace, syscalls.CLONE_NEWNS)
            work()
        except BaseException as error:  # it must not print or raise in there
            failures.append(error)

    thread = threading.Thread(target=enter)  # not from a pool: it stays in the container's namespace
    try:
        thread.start()
        thread.join()
    finally:
        os.close(namespace)
    if failures:
        raise failures[0]


def _namespace(container: Container) -> int:
    """Open the mount namespace of a container's init process.  Raises NotRunning."""
    child = container.process("").child
    try:
        namespace = os.open(f"/proc/{child.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        namespace = -1
    # Checked after opening: while it has no exit status it is not reaped, and its pid is not reused.
    if namespace < 0 or child.status is not None:
        if namespace >= 0:
            os.close(namespace)
        raise NotRunning(container_id=container.id)
    return namespace

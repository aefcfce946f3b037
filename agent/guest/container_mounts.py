"""File systems inside containers that run: mounted in their mount namespaces, and let go of.

Each is made outside, where the guest's devices are, and goes inside as a descriptor, so the container needs neither the
device nor the right to mount.  What goes inside is a thread of the agent's, for one path, on which no symbolic link is
followed.  Source: fsopen(2), fsmount(2), move_mount(2), setns(2).
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time

from caisson.agent.base import syscalls
from caisson.agent.base.errors import Failed, Invalid, TooLate, WrongState
from caisson.agent.guest import modules
from caisson.agent.guest.storage import open_point
from caisson.agent.model.container import STOPPED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from caisson.agent.model.container import Container

#: File systems of the host's by a tag, and memory; with the modules of the kernel that they need.
KINDS: dict[str, tuple[str, ...]] = {"virtiofs": ("virtiofs",), "9p": ("9pnet_virtio", "9p"), "tmpfs": ()}

#: What is said of a tag that is not there (yet).
UNKNOWN_TAG = (errno.EINVAL, errno.ENOENT)
INTERVAL = 0.02


class InsideMounts:
    """What was mounted so, by its source."""

    def __init__(self, container: Callable[[str], Container], timeout: float) -> None:
        """``container`` finds one by its id, or raises NotFound; a tag is waited for ``timeout`` seconds."""
        self._container = container
        self._timeout = timeout
        self._mounted: dict[str, list[tuple[Container, str]]] = {}

    async def mount(
        self, container_id: str, source: str, fstype: str, mount_point: str, options: Sequence[str]
    ) -> None:
        """Mount a file system.  Raises NotFound, Invalid, WrongState, Failed, or TooLate for a tag that does not come.

        ``options`` are as for mount(8), of the file system; nosuid and nodev it is always.
        """
        if fstype not in KINDS:
            raise Invalid(f"{fstype!r} cannot be mounted inside a container; file systems that can: {', '.join(KINDS)}")
        container = self._container(container_id)
        await asyncio.to_thread(modules.need, KINDS[fstype])
        deadline = time.monotonic() + self._timeout
        while True:  # of a tag that comes the kernel says nothing before Linux 6.9
            try:
                made = await asyncio.to_thread(_make, source, fstype, options)
                break
            except OSError as error:
                if error.errno == errno.ENODEV:
                    raise Failed(f"Could not mount {source}: the guest's kernel has no {fstype}") from error
                if error.errno not in UNKNOWN_TAG or fstype == "tmpfs":
                    raise Failed(f"Could not mount {source}: {_why(error)}") from error
                if time.monotonic() > deadline:
                    raise TooLate(f"Could not mount {source}: no device has this tag") from error
            await asyncio.sleep(INTERVAL)

        def attach() -> None:
            point = open_point(mount_point, 0o755)
            try:
                syscalls.move_mount(made, point)
            finally:
                os.close(point)

        try:
            await asyncio.to_thread(_inside, container, attach)
        except OSError as error:
            raise Failed(f"Could not mount {source} on {mount_point} of {container_id}: {_why(error)}") from error
        finally:
            os.close(made)
        lasting = [one for one in self._mounted.get(source, ()) if one[0].status != STOPPED]
        self._mounted[source] = [*lasting, (container, mount_point)]

    async def unmount(self, source: str) -> None:
        """Let go of all that was mounted of a source; fine when there is nothing.  Raises Failed."""
        mounted = self._mounted.get(source, [])
        while mounted:
            container, mount_point = one = mounted[-1]

            def detach(mount_point: str = mount_point) -> None:
                parent, _, name = mount_point.rstrip("/").rpartition("/")
                at = open_point(parent, 0o755) if parent else os.open("/", os.O_PATH | os.O_CLOEXEC)
                try:
                    os.fchdir(at)  # of this thread alone
                finally:
                    os.close(at)
                syscalls.umount2(name, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)

            try:
                await asyncio.to_thread(_inside, container, detach)
            except WrongState:
                pass  # it has ended, and its mounts with it
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT):  # somebody inside has done it
                    raise Failed(f"Could not unmount {mount_point} of {container.id}: {_why(error)}") from error
            if one in mounted:  # two at once may have done it
                mounted.remove(one)


def _why(error: OSError) -> str:
    return os.strerror(error.errno or 0).lower()


def _make(source: str, fstype: str, options: Sequence[str]) -> int:
    """A file system that is mounted nowhere, as a descriptor.  Raises OSError."""
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
    """Do something in a container's mount namespace, from its root.  Raises WrongState, and the work's OSError."""
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            syscalls.unshare(syscalls.CLONE_FS)  # root and current directory of this thread alone
            namespace = _namespace(container)
            try:
                syscalls.setns(namespace, syscalls.CLONE_NEWNS)
            finally:
                os.close(namespace)
            work()
        except (OSError, WrongState) as error:
            failures.append(error)

    thread = threading.Thread(target=enter)  # one that has been inside is of no other use
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def _namespace(container: Container) -> int:
    """The mount namespace of a container's first process."""
    child = container.process("").child
    try:
        namespace = os.open(f"/proc/{child.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        namespace = -1
    # Looked at after that: as long as it has no status it is not reaped, and its number is nobody else's.
    if namespace < 0 or child.status is not None:
        if namespace >= 0:
            os.close(namespace)
        raise WrongState(f"Cannot mount in stopped container {container.id}")
    return namespace

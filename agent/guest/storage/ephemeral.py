"""Storages in the guest's own memory: tmpfs, huge pages, and plain directories.

The containers of a pod share them, and one that is restarted finds its files again: they stay until the sandbox ends.
"""

from __future__ import annotations

import os
import stat

from caisson.agent.base.errors import InvalidArgument, SystemCallFailed, reason
from caisson.agent.guest.storage import mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from caisson.agent.guest.storage.storages import Storage

HUGE_PAGES = "/sys/kernel/mm/hugepages"

#: The option that names the group of a pod's volume; not a file system option.
GROUP = "fsgid"


def make_local(storage: Storage) -> None:
    """Create a directory with the mode and group given by options.  Raises InvalidArgument or SystemCallFailed."""
    text = mounts.option(storage.options, "mode") or "0777"
    try:
        mode = int(text, 8)
    except ValueError:
        raise InvalidArgument(f"storage {storage.mount_point}: mode={text} is not an octal number") from None
    mounts.make_directory(storage.mount_point, mode & 0o7777)
    _set_group(storage)


def make_ephemeral(storage: Storage) -> None:
    """Mount a tmpfs, or huge pages, reserving as many as the options say.

    Raises InvalidArgument or SystemCallFailed.
    """
    if storage.fstype == "hugetlbfs":
        _reserve_huge_pages(storage)
    try:
        os.close(mounts.open_point(storage.mount_point, 0o777))
    except OSError as error:
        why = reason(error)
        text = f"Could not create destination mount point: {storage.mount_point}: {why}"
        raise SystemCallFailed(text) from error
    mounts.mount(storage.but(source=storage.source or storage.fstype, options=_without_group(storage.options)))
    _set_group(storage)


def resize(storage: Storage) -> None:
    """Remount a tmpfs with new options, above all its size.  Raises SystemCallFailed."""
    options = [one for one in _without_group(storage.options) if one != "remount"]
    if options:
        mounts.remount(storage.mount_point, options)


def _without_group(options: Sequence[str]) -> tuple[str, ...]:
    return tuple(one for one in options if not one.startswith(f"{GROUP}="))


def _set_group(storage: Storage) -> None:
    """Give the root to the pod's group, with the set-group-ID bit so that new files inherit it (inode(7))."""
    text = mounts.option(storage.options, GROUP)
    if not text:
        return
    if not text.isdecimal():
        raise InvalidArgument(f"storage {storage.mount_point}: {GROUP}={text} is not a group's number")
    try:
        root = mounts.open_point(storage.mount_point, 0o755)
        try:
            place = f"/proc/self/fd/{root}"
            os.chown(place, -1, int(text))
            os.chmod(place, stat.S_IMODE(os.fstat(root).st_mode) | stat.S_ISGID)  # noqa: PTH101
        finally:
            os.close(root)
    except OSError as error:
        raise SystemCallFailed(f"Could not set the group of {storage.mount_point}: {reason(error)}") from error


def _reserve_huge_pages(storage: Storage) -> None:
    size, page = (mounts.option(storage.options, name) for name in ("size", "pagesize"))
    if not (size.isdecimal() and page.isdecimal() and int(page) >= 1024):
        raise InvalidArgument(f"storage {storage.mount_point}: hugetlbfs needs size=BYTES and pagesize=BYTES")
    file = f"{HUGE_PAGES}/hugepages-{int(page) // 1024}kB/nr_hugepages"
    wanted = int(size) // int(page)
    try:
        with open(file, "r+") as pages:  # noqa: PTH123 - a sysfs file
            pages.write(str(wanted))
            pages.flush()
            pages.seek(0)
            got = int(pages.read())
    except OSError as error:
        raise SystemCallFailed(f"{file}: {reason(error)}") from error
    if got < wanted:  # the write succeeds regardless of how many were found
        raise SystemCallFailed(f"{file}: only {got} of {wanted} huge pages; give the guest more memory")

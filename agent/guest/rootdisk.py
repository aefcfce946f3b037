"""The disks that the guest itself runs from: no container may read or write them, whatever it is allowed to.

A container that can make device nodes could otherwise open the root disk and change the agent (CVE-2020-2023).
Source: Documentation/ABI/testing/sysfs-block, sysfs-block-dm.
"""

from __future__ import annotations

import os

SYSFS = "/sys/dev/block"


def root_disks(path: str = "/", sysfs: str = SYSFS) -> tuple[tuple[int, int], ...]:
    """Return the device that `path` lies on, and all below it: of mapped devices, the disk, its partitions.

    Empty for a root that is not on a disk.  Sorted (major, minor) pairs.
    """
    device = os.stat(path).st_dev  # noqa: PTH116 - no pathlib at start
    found: set[tuple[int, int]] = set()
    if os.major(device):  # 0: anonymous, such as an overlay or the initial RAM disk
        _collect(f"{sysfs}/{os.major(device)}:{os.minor(device)}", found)
        found.add((os.major(device), os.minor(device)))
    return tuple(sorted(found))


def _collect(link: str, found: set[tuple[int, int]]) -> None:
    directory = os.path.realpath(link)
    number = _number(directory)
    if number is None or number in found:
        return
    found.add(number)
    if os.path.exists(f"{directory}/partition"):  # noqa: PTH110 - no pathlib at start
        _collect(os.path.dirname(directory), found)  # noqa: PTH120
    for name in _names(directory):
        if os.path.exists(f"{directory}/{name}/partition"):  # noqa: PTH110
            _collect(f"{directory}/{name}", found)
    for name in _names(f"{directory}/slaves"):
        _collect(f"{directory}/slaves/{name}", found)


def _number(directory: str) -> tuple[int, int] | None:
    try:
        with open(f"{directory}/dev") as file:  # noqa: PTH123
            major, _, minor = file.read().strip().partition(":")
    except OSError:
        return None
    return int(major), int(minor)


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))  # noqa: PTH208
    except OSError:
        return []

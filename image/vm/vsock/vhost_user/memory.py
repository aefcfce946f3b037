"""The guest's memory: bounds-checked access by address.

Python's slices clip silently, so every bound is compared here before a slice is made; Python's integers do not wrap, so
``address + length`` is exact.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable, Sequence


class GuestAddressError(Exception):
    """An address range is not (entirely) in the guest's memory."""


class Region:
    """A piece of guest memory: its guest address, its address in QEMU, and its bytes here."""

    __slots__ = ("data", "guest", "size", "user")

    def __init__(self, guest: int, user: int, data: memoryview) -> None:
        self.guest = guest
        self.user = user
        self.size = len(data)
        self.data = data


class Memory:
    """All regions of one memory table."""

    __slots__ = ("_last", "_regions")

    def __init__(self, regions: Sequence[Region] = ()) -> None:
        self._regions = sorted(regions, key=lambda region: region.guest)
        self._last = self._regions[0] if self._regions else Region(0, 0, memoryview(b""))

    @classmethod
    def map(cls, table: Iterable[tuple[int, int, int, int]], fds: Sequence[int]) -> Memory:
        """Map ``(guest address, size, QEMU's address, offset in the file)`` rows, one descriptor each, left open.

        Raises GuestAddressError for a region that its file does not hold, OSError if it cannot be mapped.
        """
        regions = []
        for (guest, size, user, offset), fd in zip(table, fds, strict=True):
            if size == 0 or guest + size > 1 << 64 or user + size > 1 << 64:
                raise GuestAddressError(f"memory region at {guest:#x} of {size:#x} bytes is not valid")
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise GuestAddressError(f"memory region at {guest:#x} is not in a file")
            held = status.st_size
            if offset + size > held:  # accessing a page beyond the end of the file causes SIGBUS
                raise GuestAddressError(
                    f"memory region at {guest:#x} ends at {offset + size:#x} in a file of {held:#x}"
                )
            # From the file's start, as huge pages ask for aligned offsets.
            mapping = mmap.mmap(fd, offset + size)
            mapping.madvise(mmap.MADV_DONTDUMP)
            regions.append(Region(guest, user, memoryview(mapping)[offset:]))
        return cls(regions)

    def view(self, address: int, length: int) -> memoryview:
        """Return the bytes at a guest address, inside one region.  Raises GuestAddressError."""
        region = self._last
        offset = address - region.guest
        if offset >= 0 and offset + length <= region.size:
            return region.data[offset : offset + length]
        for region in self._regions:
            offset = address - region.guest
            if offset >= 0 and offset + length <= region.size:
                self._last = region
                return region.data[offset : offset + length]
        raise GuestAddressError(f"{length:#x} bytes at guest address {address:#x} are not in the guest's memory")

    def views(self, address: int, length: int) -> list[memoryview]:
        """Return the bytes at a guest address, across adjacent regions (hot-plugged memory).  Raises
        GuestAddressError.
        """
        found = []
        end = address + length
        for region in self._regions:
            offset = address - region.guest
            if 0 <= offset < region.size and address < end:
                take = min(end - address, region.size - offset)
                found.append(region.data[offset : offset + take])
                address += take
        if address != end:
            raise GuestAddressError(f"{length:#x} bytes up to guest address {end:#x} are not in the guest's memory")
        return found

    def ring(self, user: int, length: int) -> memoryview:
        """Return the bytes at an address of QEMU's, inside one region.  Raises GuestAddressError."""
        for region in self._regions:
            offset = user - region.user
            if offset >= 0 and offset + length <= region.size:
                return region.data[offset : offset + length]
        raise GuestAddressError(f"{length:#x} bytes at QEMU's address {user:#x} are not in the guest's memory")

"""Implement the driver's side of a split virtqueue (virtio 1.2, section 2.7)."""

from __future__ import annotations

import os
import struct
import threading

RING_SIZE = 128


class DriverRing:
    """The driver's side of one split virtqueue."""

    def __init__(self, memory: memoryview, offset: int, *, event_idx: bool = True, size: int = RING_SIZE) -> None:
        self.size = size
        self.event_idx = event_idx
        self.lock = threading.Lock()
        self.table = memory[offset : offset + 16 * size]
        self.offsets = (offset, offset + 0x4000, offset + 0x8000)  # descriptors, used, avail
        self.avail = memory[offset + 0x8000 : offset + 0x8000 + 6 + 2 * size].cast("H")
        self.used = memory[offset + 0x4000 : offset + 0x4000 + 6 + 8 * size].cast("H")
        self.elements = memory[offset + 0x4000 : offset + 0x4000 + 4 + 8 * size].cast("I")
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        self.seen = 0
        self.index = 0

    def describe(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        struct.pack_into("<QIHH", self.table, 16 * index, address, length, flags, following)

    def offer(self, head: int, *, kick: bool = True) -> None:
        self.avail[2 + self.index % self.size] = head
        self.index = (self.index + 1) & 0xFFFF
        self.avail[1] = self.index
        if kick:
            self.notify(1)

    def notify(self, added: int) -> None:
        """Notify the device of the last ``added`` chains, if it wants that."""
        with self.lock:  # a full barrier between the store above and the next load
            pass
        if self.event_idx:
            wanted = (self.index - self.used[2 + 4 * self.size] - 1) & 0xFFFF < added
        else:
            wanted = not self.used[0] & 1
        if wanted:
            os.eventfd_write(self.kick, 1)

    def done(self) -> list[tuple[int, int]]:
        """Return the heads and lengths of used chains.  Requests an interrupt at the next one."""
        found = []
        while self.seen != self.used[1]:
            at = 1 + 2 * (self.seen % self.size)
            found.append((self.elements[at], self.elements[at + 1]))
            self.seen = (self.seen + 1) & 0xFFFF
            self.avail[2 + self.size] = self.seen
        return found

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)

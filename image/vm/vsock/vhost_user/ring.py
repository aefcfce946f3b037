"""A split virtqueue, device side (virtio 1.2, section 2.7), over memory that a hostile guest writes concurrently.

Shared indices are read and written through ``memoryview.cast``: one aligned load or store each.  ``struct.pack_into``
would zero the field first and then store it byte by byte, which the guest can see.
"""

from __future__ import annotations

import _thread
import os
import struct

from .memory import GuestAddressError, Memory

DESCRIPTOR = struct.Struct("<QIHH")  # address, length, flags, next
NEXT = 1
WRITE = 2
INDIRECT = 4
NO_INTERRUPT = 1  # avail.flags
NO_NOTIFY = 1  # used.flags
MAX_SIZE = 32768
ONE = (1).to_bytes(8, "little")

#: x86 reorders nothing but a store with a later load.
STRONG = os.uname().machine in ("x86_64", "i686")


class RingError(Exception):
    """The driver violated the virtqueue protocol; the device must stop."""


class Ring:
    """One virtqueue: its vhost-user settings and, while running, its descriptor table, available and used ring."""

    def __init__(self, name: str, *, writable: bool) -> None:
        self.name = name
        self._writable = WRITE if writable else 0  # the direction of every descriptor
        # Set by the front end.
        self.size = 0
        self.base = 0
        self.returned: int | None = None  # the last response to GET_VRING_BASE
        self.addresses: tuple[int, int, int] | None = None  # descriptors, used, avail: QEMU's addresses
        self.kick = -1
        self.call = -1
        self.error = -1
        self.enabled = False
        # While it runs.
        self.running = False
        self._memory = Memory()
        self._event_idx = False
        self._indirect = False
        self._lock = _thread.allocate_lock()
        empty = memoryview(b"")
        self._descriptors = empty
        self._avail = empty.cast("H")
        self._used = empty.cast("H")
        self._elements = empty.cast("I")
        self._mask = 0
        self._next = 0  # next entry of avail to take
        self._avail_idx = 0  # avail.idx when last looked at
        self._used_next = 0
        self._published = 0
        self._notified = 0

    def start(self, memory: Memory, *, event_idx: bool, indirect: bool) -> None:
        """Start at ``base``.  Raises RingError for an invalid size or address."""
        self._event_idx = event_idx
        self._indirect = indirect
        self._next = self._avail_idx = self.base
        self.map(memory)
        self._used_next = self._published = self._notified = self._used[1]
        self.running = True

    def map(self, memory: Memory) -> None:
        """Map the three areas, again after memory was hot-plugged.  Raises RingError."""
        size = self.size
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise RingError(f"{self.name}: a ring of {size} entries")
        if self.addresses is None:
            raise RingError(f"{self.name}: started without addresses")
        descriptors, used, avail = self.addresses
        if descriptors % 16 or used % 4 or avail % 2:
            raise RingError(f"{self.name}: misaligned ring addresses")
        try:
            self._descriptors = memory.ring(descriptors, 16 * size)
            self._avail = memory.ring(avail, 6 + 2 * size).cast("H")
            area = memory.ring(used, 6 + 8 * size)
        except GuestAddressError as error:
            raise RingError(f"{self.name}: {error}") from None
        self._used = area.cast("H")
        self._elements = area[: 4 + 8 * size].cast("I")
        self._memory = memory
        self._mask = size - 1

    def stop(self) -> int:
        """Stop; returns the index of the next available entry."""
        if self.running:
            self.publish_and_notify()
            self.running = False
            self.base = self._next
            empty = memoryview(b"")
            self._descriptors = empty
            self._avail = self._used = empty.cast("H")
            self._elements = empty.cast("I")
            self._memory = Memory()
        return self.base

    def pop_available(self) -> tuple[int, list[memoryview]] | None:
        """Take the next descriptor chain: its head and its pieces of memory in order; None if there is none.

        Raises RingError.
        """
        position = self._next
        if position == self._avail_idx and not self._read_avail_idx():
            return None
        head = self._avail[2 + (position & self._mask)]
        try:
            pieces = self._read_chain(head)
        except GuestAddressError as error:
            raise RingError(f"{self.name}: {error}") from None
        self._next = (position + 1) & 0xFFFF
        return head, pieces

    def unpop(self, count: int) -> None:
        """Put back the last ``count`` chains, as if they had not been taken."""
        self._next = (self._next - count) & 0xFFFF

    def add_used(self, head: int, written: int) -> None:
        """Add a chain to the used ring; the driver sees it after the next ``publish_used``."""
        position = (self._used_next & self._mask) * 2 + 1
        self._elements[position] = head
        self._elements[position + 1] = written
        self._used_next = (self._used_next + 1) & 0xFFFF

    def unpublished(self) -> int:
        """Count the used chains since the last ``publish_used``."""
        return (self._used_next - self._published) & 0xFFFF

    def publish_used(self) -> None:
        """Update the used index: the driver sees the added chains when it next looks."""
        if not STRONG:
            os.sched_yield()
        self._used[1] = self._published = self._used_next

    def notify(self) -> None:
        """Send a used buffer notification for what was published since the last one, unless suppressed (2.7.7)."""
        new, old = self._published, self._notified
        if new == old:
            return
        self._notified = new
        self._fence()
        if self._event_idx:
            wanted = (new - self._avail[2 + self.size] - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            wanted = not self._avail[0] & NO_INTERRUPT
        if wanted and self.call >= 0:
            try:
                os.write(self.call, ONE)
            except OSError:
                pass  # the counter is full, which notifies as well; or it is not an eventfd, and nothing waits for it

    def has_available(self) -> bool:
        """Return whether the driver has made a chain available since ``pop_available`` found none."""
        return self._avail[1] != self._next

    def publish_and_notify(self) -> None:
        """Update the used index and notify the driver."""
        self.publish_used()
        self.notify()

    def enable_notifications(self) -> bool:
        """Enable available buffer notifications (2.7.10); True if a chain became available meanwhile."""
        if self._event_idx:
            self._used[2 + 4 * self.size] = self._next
        else:
            self._used[0] = 0
        self._fence()
        return self._read_avail_idx()

    def disable_notifications(self) -> None:
        """Suppress available buffer notifications.  With EVENT_IDX there is nothing to do: the last requested event has
        passed.
        """
        if not self._event_idx:
            self._used[0] = NO_NOTIFY

    def fail(self) -> None:
        """Signal a broken ring on the error descriptor, if the front end gave one."""
        if self.error >= 0:
            try:
                os.write(self.error, ONE)
            except OSError:
                pass

    def _read_avail_idx(self) -> bool:
        seen = self._avail[1]
        waiting = (seen - self._next) & 0xFFFF
        if waiting > self.size:
            raise RingError(f"{self.name}: avail index {seen} is {waiting} ahead in a ring of {self.size}")
        self._avail_idx = seen
        if not STRONG:
            os.sched_yield()
        return waiting != 0

    def _read_chain(self, head: int) -> list[memoryview]:
        table, entries = self._descriptors, self.size
        index, count = head, 0
        nested = False
        pieces: list[memoryview] = []
        while True:
            if index >= entries:
                raise RingError(f"{self.name}: descriptor {index} of {entries}")
            # Read once: the values checked below are those used, even if the guest changes the table meanwhile.
            address, length, flags, following = DESCRIPTOR.unpack_from(table, 16 * index)
            if flags & INDIRECT:
                if nested or flags & NEXT or not self._indirect:
                    raise RingError(f"{self.name}: an indirect table where none may be")
                if not length or length % 16 or length > 16 * MAX_SIZE:
                    raise RingError(f"{self.name}: an indirect table of {length} bytes")
                table, entries = self._memory.view(address, length), length // 16
                nested, index = True, 0
                continue
            count += 1
            if count > self.size:
                raise RingError(f"{self.name}: a chain of more than {self.size} descriptors, or a loop")
            if flags & WRITE != self._writable:
                raise RingError(f"{self.name}: a descriptor in the wrong direction")
            if length:
                try:
                    pieces.append(self._memory.view(address, length))
                except GuestAddressError:
                    pieces.extend(self._memory.views(address, length))
            if not flags & NEXT:
                return pieces
            index = following

    def _fence(self) -> None:
        """Order our store before our next load: a full barrier (2.7.7, 2.7.10.1)."""
        if STRONG:
            with self._lock:  # a locked read-modify-write
                pass
        else:
            os.sched_yield()  # goes through the scheduler's full barrier

"""Play a hostile guest and front end: random ring states near the limits of what is allowed.

``Hostile`` corrupts the rings of a ``fake_guest.Guest``, restarts them with as few requests as possible and reports
whether the device still answers.  Memory is two regions of a file with a hole between them: what the device must not
touch is watched.
"""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable

from caisson.image.vm.vsock.vhost_user import packet
from caisson.image.vm.vsock.vhost_user import protocol as p
from tests.component.driver_ring import RING_SIZE, DriverRing
from tests.component.fake_guest import GUEST, USER, Guest
from tests.component.vhost_device import AGENT, CID

MB = 1 << 20
NEXT, WRITE, INDIRECT = 1, 2, 4
#: Regions: offset in the file (and from GUEST and USER), size.  The gap between them, and everything after, is off
#: limits.
REGIONS = ((0, 8 * MB), (12 * MB, 3 * MB))
#: Never offered to the device: the end of the first region, the hole, and the end of the file.
FORBIDDEN = ((0x780000, 8 * MB - 4096), (8 * MB, 12 * MB), (15 * MB, 16 * MB))
PACKETS, BUFFERS, TABLES = 0x500000, 0x200000, 0x580000
#: Where a host program listens for connections.
PORT = 7000
ADDRESSES = [
    0, GUEST - 1, GUEST + 8 * MB - 44, GUEST + 8 * MB, GUEST + 12 * MB - 1, GUEST + 15 * MB - 43, GUEST + 15 * MB,
    GUEST + 16 * MB, 1 << 32, 1 << 63, 2**64 - 8, 2**64 - 1,
]  # fmt: skip
LENGTHS = [0, 1, 15, 16, 43, 44, 45, 46, 4096, 4140, 65536, MB, 2**31, 2**32 - 1]
SMALL = [0, 1, 16, 43, 44, 45, 60, 4096, 4140]
COUNTS = [1, 1, 2, 2, 3, 16, 64, RING_SIZE]
TOO_MANY = [RING_SIZE + 1, 2 * RING_SIZE, 32768, 65535]
BASES = [0, 0, 1, 127, 128, 65400, 65534, 65535]
SIZES = [0, 1, 4096, MB, 15 * MB, 16 * MB, GUEST, USER, USER + MB, 2**31, 2**62, 2**63 - 1, 2**63, 2**64 - 4096]
#: All requests except those whose replies show whether the device is alive.
REQUESTS = [number for number in (*range(1, 6), *range(8, 15), 16, 18) if number != p.GET_PROTOCOL_FEATURES]
UNKNOWN = [number for number in (0, *range(19, 48), 2**32 - 1) if number != p.GET_CONFIG]
OPERATIONS = [*range(9), packet.REQUEST, packet.RW, packet.RW, 255, 65535]


class Hostile:
    """Drives the device of ``guest``; ``guest.reboot()`` restores its rings."""

    def __init__(self, guest: Guest, chance: random.Random) -> None:
        self.guest = guest
        self.chance = chance
        self.canaries = {area: chance.randbytes(area[1] - area[0]) for area in FORBIDDEN}
        for (start, end), data in self.canaries.items():
            guest.memory[start:end] = data
        reader, self._pipe = os.pipe2(os.O_NONBLOCK)
        os.close(reader)
        self._null = os.open("/dev/null", os.O_RDWR)
        self._empty = os.memfd_create("empty")
        self._ends = socket.socketpair()

    def close(self) -> None:
        for fd in (self._pipe, self._null, self._empty):
            os.close(fd)
        for end in self._ends:
            end.close()

    def intact(self) -> bool:
        """Check that nothing was written to memory that was not offered."""
        return all(self.guest.memory[start:end] == data for (start, end), data in self.canaries.items())

    def share_memory(self) -> None:
        """Share the two regions with the device."""
        table = struct.pack("<II", len(REGIONS), 0)
        for offset, size in REGIONS:
            table += struct.pack("<QQQQ", GUEST + offset, size, USER + offset, offset)
        assert self.guest.acknowledged(p.SET_MEM_TABLE, table, (self.guest.memfd,) * len(REGIONS))

    # Packets in well-formed chains.

    def packet(self, spared: tuple[int, int]) -> None:
        """Send random packets to the given port pairs, or none; never for the ``spared`` one."""
        chance = self.chance
        ports = chance.choice([AGENT, 5000, 5001, 2**32 - 1]), chance.choice([PORT, PORT + 1, 1 << 30, spared[1], 0])
        if ports == spared:
            return
        self.guest.packet(
            chance.choice(OPERATIONS),
            *ports,
            bytes(chance.choice([0, 0, 1, 100, 5000, 40000])),
            flags=chance.choice([0, 1, 2, 3, 2**32 - 1]),
            window=chance.choice([0, 1, 2**18, 2**32 - 1]),
            forwarded=chance.choice([0, 5000, 2**31, 2**32 - 1]),
            cid=chance.choice([CID] * 20 + [0, 1, 2, CID + 1, 2**64 - 1]),
            to=chance.choice([2] * 20 + [0, 1, 3, 2**64 - 1]),
            kind=chance.choice([1] * 20 + [0, 2, 65535]),
            length=chance.choice([-1] * 10 + [0, 1, 2**31, 2**32 - 1]),
        )

    # Rings.

    def ring_state(self, between: Callable[[], object] | None = None) -> None:
        """Corrupt both rings, start them, notify, wait until the device has looked, stop them.

        ``between`` is called once one ring has started and host programs wait for the other.
        """
        chance, guest = self.chance, self.guest
        for number in (0, 1):
            if number and between:
                guest.settle()
                between()
            base = chance.choice(BASES) if chance.random() < 0.8 else chance.randrange(65536)
            self._scribble(number, base)
            if chance.random() < 0.05:
                self._misplace(number)
            guest.tell(p.SET_VRING_BASE, struct.pack("<II", number, base))
            guest.tell(p.SET_VRING_KICK, struct.pack("<Q", number), (self._ring(number).kick,))
        for number in (1, 0):
            os.eventfd_write(self._ring(number).kick, 1)
        guest.settle()
        for number in (0, 1):
            stopped = guest.ask(p.GET_VRING_BASE, struct.pack("<II", number, 0))
            assert struct.unpack("<II", stopped)[1] < 65536
            self._place(number)

    def _ring(self, number: int) -> DriverRing:
        return self.guest.tx if number else self.guest.rx

    def _scribble(self, number: int, base: int) -> None:
        chance, ring = self.chance, self._ring(number)
        heads = [self._chain(number, 12 * place) for place in range(chance.choice([1, 2, 4]))]
        for place in range(base, base + RING_SIZE):
            ring.avail[2 + place % RING_SIZE] = chance.choice(heads)
        if chance.random() < 0.05:
            ring.avail[2 + base % RING_SIZE] = chance.choice([RING_SIZE, 32768, 65535])
        ring.avail[0] = chance.randrange(4)
        ring.avail[1] = (base + chance.choice(COUNTS if chance.random() < 0.9 else TOO_MANY)) & 0xFFFF
        ring.avail[2 + RING_SIZE] = chance.randrange(65536)  # used_event
        ring.used[1] = chance.choice([base, base, chance.randrange(65536)])

    def _chain(self, number: int, first: int) -> int:
        """Write a chain of up to ten descriptors from ``first`` on; usually all but one are valid."""
        chance, ring = self.chance, self._ring(number)
        good = 0 if number else WRITE
        size = chance.choice([1, 1, 2, 2, 3, 10])
        wrong = chance.randrange(size) if chance.random() < 0.3 else -1
        for index in range(first, first + size):
            flags = good | (NEXT if index < first + size - 1 else 0)
            fields = [self._address(number), chance.choice(SMALL[3:]), flags, index + 1]
            if index == first and chance.random() < 0.2:
                fields[:3] = self._table(number), 16 * chance.choice([1, 2, 3, 10]), INDIRECT
            if index - first == wrong:
                self._spoil(fields, first, size)
            ring.describe(index, *fields)
        return first

    def _spoil(self, fields: list[int], first: int, size: int) -> None:
        chance = self.chance
        kind = chance.randrange(5)
        if kind == 0:
            fields[0] = chance.choice(ADDRESSES)
        elif kind == 1:
            fields[1] = chance.choice(LENGTHS)
        elif kind == 2:
            fields[2] = chance.choice([0, 1, 2, 3, 4, 5, 7, 65535])
        elif kind == 3:  # a loop, or outside the table
            fields[2:] = fields[2] | NEXT, chance.choice([first, first + size - 1, RING_SIZE, 65535])
        else:
            fields[:] = [chance.choice(ADDRESSES), chance.choice(LENGTHS), chance.randrange(8), chance.randrange(65536)]

    def _address(self, number: int) -> int:
        chance = self.chance
        if number == 0:
            # Also over the rings themselves: the guest may write anything there.
            places = [BUFFERS + 8192 * chance.randrange(64)] * 9 + [0x10000, 0x14000, 0x18000, 0x20000, 12 * MB]
            return GUEST + chance.choice(places)
        place = PACKETS + 128 * chance.randrange(64)
        packet.HEADER.pack_into(
            self.guest.memory, place,
            chance.choice([CID] * 9 + [CID + 1]), 2, chance.choice([AGENT, 5000]), chance.choice([PORT, 1 << 30]),
            chance.choice([0, 0, 1, 16, 2**32 - 1]), 1, chance.choice(OPERATIONS), chance.randrange(4),
            chance.choice([0, 1 << 18, 2**32 - 1]), chance.choice([0, 1, 2**32 - 1]),
        )  # fmt: skip
        return GUEST + place

    def _table(self, number: int) -> int:
        """Write an indirect table of ten descriptors, some of them invalid."""
        chance = self.chance
        place = TABLES + 256 * chance.randrange(64)
        good = 0 if number else WRITE
        for index in range(10):
            fields = [self._address(number), chance.choice(SMALL[3:]), good | (NEXT if index < 9 else 0), index + 1]
            if chance.random() < 0.02:
                self._spoil(fields, 0, 10)
            struct.pack_into("<QIHH", self.guest.memory, place + 16 * index, *fields)
        return GUEST + place

    def _misplace(self, number: int) -> None:
        """Change a ring's size or address."""
        chance = self.chance
        places = [USER + offset for offset in self._ring(number).offsets]
        if chance.random() < 0.5:
            size = chance.choice([0, 1, 2, 3, 127, 1024, 32768, 65536, 2**31, 2**32 - 1])
            self.guest.tell(p.SET_VRING_NUM, struct.pack("<II", number, size))
        else:
            elsewhere = [0, USER - 16, USER + 8 * MB - 16, USER + 8 * MB, USER + 3, places[0], 2**64 - 16]
            places[chance.randrange(3)] = chance.choice(elsewhere)
            self.guest.tell(p.SET_VRING_ADDR, struct.pack("<IIQQQQ", number, 0, *places, 0))

    def _place(self, number: int) -> None:
        places = [USER + offset for offset in self._ring(number).offsets]
        self.guest.tell(p.SET_VRING_NUM, struct.pack("<II", number, RING_SIZE))
        self.guest.tell(p.SET_VRING_ADDR, struct.pack("<IIQQQQ", number, 0, *places, 0))

    # The control socket.

    def request(self) -> None:
        """Send a request that QEMU would not send, with descriptors of all kinds, and wait for the reply."""
        chance, guest = self.chance, self.guest
        number = chance.choice(REQUESTS) if chance.random() < 0.8 else chance.choice(UNKNOWN)
        payload = self._payload(number)
        if chance.random() < 0.2:
            payload = (payload + bytes(400))[: chance.choice([0, 7, 8, 9, len(payload) + 8, 400])]
        kinds = [guest.memfd, guest.rx.kick, guest.tx.call, self._pipe, self._null, self._empty, self._ends[0].fileno()]
        usual = chance.random() < 0.5
        count = 1 if usual else chance.choice([0, 1, 2, 8])
        fds = tuple(guest.memfd if usual else chance.choice(kinds) for _ in range(count))
        guest.tell(number, payload, fds, chance.choice([1, 1, 1 | p.NEED_REPLY]))
        guest.tell(p.GET_PROTOCOL_FEATURES)
        while True:
            answer, _flags, size = struct.unpack("<III", guest.control.recv(12, socket.MSG_WAITALL))
            if size:
                guest.control.recv(size, socket.MSG_WAITALL)
            if answer == p.GET_PROTOCOL_FEATURES:
                return

    def _payload(self, number: int) -> bytes:
        """Return a payload, at least of the right length."""
        chance = self.chance
        if number in (p.SET_FEATURES, p.SET_PROTOCOL_FEATURES):
            return struct.pack(
                "<Q", chance.choice([0, 1 << 30, 1 << 32 | 1 << 30 | 1 << 29, 1 << 9 | 1 << 3, 2**64 - 1])
            )
        if number in (p.SET_VRING_KICK, p.SET_VRING_CALL, p.SET_VRING_ERR):
            return struct.pack("<Q", chance.choice([0, 1, 0x100, 0x101, 2, 255, 2**64 - 1]))
        if number == p.SET_MEM_TABLE:
            rows = chance.choice([0, 1, 1, 1, 2, 8, 2**32 - 1])
            numbers = [chance.choice(SIZES) for _ in range(4 * min(rows, 8))]
            return struct.pack(f"<II{len(numbers)}Q", rows, 0, *numbers)
        index = chance.choice([0, 0, 1, 1, 2, 256, 2**32 - 1])
        if number == p.SET_VRING_ADDR:
            return struct.pack("<IIQQQQ", index, 0, *(chance.choice(SIZES) for _ in range(4)))
        return struct.pack("<II", index, chance.choice([0, 1, 3, RING_SIZE, 32768, 65535, 65536, 2**31]))

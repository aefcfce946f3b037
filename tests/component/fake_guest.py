"""Play QEMU and a guest's vsock driver, at native speed, to drive the vhost-user device (vhost_device.py).

``Guest`` is the front end, the memory (a memfd), two rings and a small vsock implementation, all in one thread:
``guest.until(condition, *sockets)`` handles what the device sends until the condition holds.
"""

from __future__ import annotations

import array
import mmap
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from caisson.image.vm.vsock.vhost_user import packet
from caisson.image.vm.vsock.vhost_user import protocol as p
from tests.component.driver_ring import RING_SIZE, DriverRing
from tests.component.vhost_device import AGENT, CID, Backend

USER = 0x7F00_0000_0000  # where "QEMU" maps the guest's memory
GUEST = 0x1000_0000  # the guest-physical address
SLOT = 64 << 10


class Stream:
    """A socket in the guest."""

    def __init__(self, guest: Guest, port: int, host_port: int) -> None:
        self.guest = guest
        self.port, self.host_port = port, host_port
        self.connected = self.reset = False
        self.peer_shut = 0
        self.data = bytearray()
        self.reading = True  # otherwise data stays unread, and no credit is given
        self.keep = True  # otherwise data is only counted and passed to ``sink``
        self.sink: Callable[[memoryview], object] = lambda data: None
        self.received = self.forwarded = self.reported = 0
        self.window = 256 << 10
        self.sent = self.peer_forwarded = self.peer_window = 0
        self.out: deque[memoryview] = deque()

    def send(self, data: bytes) -> None:
        self.out.append(memoryview(data))
        self.push()

    def push(self) -> None:
        while self.out and self.guest.slots:
            size = min(len(self.out[0]), SLOT, self.peer_window - (self.sent - self.peer_forwarded))
            if size <= 0:
                return
            head = self.out.popleft()
            if size < len(head):
                self.out.appendleft(head[size:])
            self.sent += size
            self.packet(packet.RW, head[:size])

    def packet(self, op: int, data: bytes | memoryview = b"", flags: int = 0) -> None:
        self.reported = self.forwarded
        self.guest.packet(op, self.port, self.host_port, data, flags, self.window, self.forwarded & packet.COUNTER_MASK)

    def shutdown(self, flags: int) -> None:
        self.packet(packet.SHUTDOWN, flags=flags)

    def read(self) -> None:
        """Resume reading, after ``reading = False``."""
        self.reading = True
        self.forwarded = self.received
        self.packet(packet.CREDIT_UPDATE)


class Guest:
    """``layout`` of receive buffers: ``two`` descriptors (Linux before 6.3), ``one`` (after), ``indirect``."""

    def __init__(self, backend: Backend, *, layout: str = "two", features: int = -1, size: int = 16 << 20) -> None:
        self.backend = backend
        self.layout = layout
        self.control = backend.control
        self.control.settimeout(10)
        self.memfd = os.memfd_create("guest")
        os.truncate(self.memfd, size)
        self.size = size
        self.mapping = mmap.mmap(self.memfd, size)
        self.memory = memoryview(self.mapping)
        self.streams: dict[tuple[int, int], Stream] = {}
        self.accepted: dict[int, deque[Stream]] = {}
        self.packets: list[tuple[int, ...]] = []  # of no stream
        self.handler: Callable[[tuple[int, ...]], bool] | None = None  # sees packets first
        self.rx = self.tx = DriverRing(self.memory, 0)
        self.wanted = features
        self.greet()
        self.boot()

    # The front end.

    def tell(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 1) -> None:
        data = struct.pack("<III", request, flags, len(payload)) + payload
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.control.sendmsg([data], ancillary)

    def ask(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 1) -> bytes:
        self.tell(request, payload, fds, flags)
        answer, _flags, size = struct.unpack("<III", self.control.recv(12, socket.MSG_WAITALL))
        assert answer == request
        return self.control.recv(size, socket.MSG_WAITALL) if size else b""

    def ask_u64(self, request: int) -> int:
        return int(struct.unpack("<Q", self.ask(request))[0])

    def acknowledged(self, request: int, payload: bytes, fds: tuple[int, ...] = ()) -> bool:
        return self.ask(request, payload, fds, 1 | p.NEED_REPLY) == bytes(8)

    def greet(self) -> None:
        """Send QEMU's first requests to a device."""
        self.features = self.ask_u64(p.GET_FEATURES) & self.wanted | p.F_PROTOCOL_FEATURES
        self.tell(p.SET_PROTOCOL_FEATURES, struct.pack("<Q", self.ask_u64(p.GET_PROTOCOL_FEATURES)))
        self.tell(p.SET_OWNER)

    def move(self, backend: Backend) -> None:
        """Switch to another device, keeping the rings."""
        self.backend, self.control = backend, backend.control
        self.control.settimeout(10)
        self.greet()
        self.resume()

    def boot(self) -> None:
        """Start a driver: empty rings, no sockets."""
        self.rx.close()
        self.memory[:0x100000] = bytes(0x100000)
        event_idx = bool(self.features & p.F_EVENT_IDX)
        self.rx = DriverRing(self.memory, 0x10000, event_idx=event_idx)
        self.tx = DriverRing(self.memory, 0x20000, event_idx=event_idx)
        self.slots = deque(range(RING_SIZE // 2))
        self.feeding = True
        self.hungry: list[int] = []
        self.rx_buffers: dict[int, tuple[memoryview, memoryview]] = {}
        for number in range(RING_SIZE if self.layout == "indirect" else RING_SIZE // 2):
            self.add_receive_buffer(number)
        self.bases = (0, 0)
        self.resume()

    def resume(self) -> None:
        """Start the rings where they stopped."""
        self.tell(p.SET_FEATURES, struct.pack("<Q", self.features))
        table = struct.pack("<IIQQQQ", 1, 0, GUEST, self.size, USER, 0)
        assert self.acknowledged(p.SET_MEM_TABLE, table, (self.memfd,))
        for number, ring in enumerate((self.rx, self.tx)):
            descriptors, used, avail = (USER + offset for offset in ring.offsets)
            self.tell(p.SET_VRING_NUM, struct.pack("<II", number, ring.size))
            self.tell(p.SET_VRING_BASE, struct.pack("<II", number, self.bases[number]))
            self.tell(p.SET_VRING_ADDR, struct.pack("<IIQQQQ", number, 0, descriptors, used, avail, 0))
            self.tell(p.SET_VRING_KICK, struct.pack("<Q", number), (ring.kick,))
            self.tell(p.SET_VRING_CALL, struct.pack("<Q", number), (ring.call,))
        for number in (0, 1):
            assert self.acknowledged(p.SET_VRING_ENABLE, struct.pack("<II", number, 1))

    def pause(self) -> None:
        """Stop the rings, as QEMU does both to pause and to reset."""
        bases = []
        for number in (0, 1):
            self.tell(p.SET_VRING_ENABLE, struct.pack("<II", number, 0))
        for number in (0, 1):
            bases.append(struct.unpack("<II", self.ask(p.GET_VRING_BASE, struct.pack("<II", number, 0)))[1])
        self.bases = (bases[0], bases[1])

    def reboot(self) -> None:
        self.pause()
        self.tx.close()
        self.streams.clear()
        self.accepted.clear()
        self.packets.clear()
        self.boot()

    # The driver.

    def add_receive_buffer(self, number: int) -> None:
        offset = 0x100000 + number * 8192
        header, payload = self.memory[offset : offset + 44], self.memory[offset + 44 : offset + 44 + 4096]
        address, ring = GUEST + offset, self.rx
        if self.layout == "two":
            ring.describe(2 * number, address, 44, 1 | 2, 2 * number + 1)
            ring.describe(2 * number + 1, address + 44, 4096, 2)
        elif self.layout == "one":
            ring.describe(2 * number, address, 4096 + 44, 2)
        else:
            struct.pack_into("<QIHHQIHH", self.memory, offset + 5000 & ~15, address, 44, 3, 1, address + 44, 4096, 2, 0)
            ring.describe(number, GUEST + (offset + 5000 & ~15), 32, 4)
        head = number if self.layout == "indirect" else 2 * number
        self.rx_buffers[head] = (header, payload)
        ring.offer(head, kick=False)

    def packet(
        self, op: int, port: int, host_port: int, data: bytes | memoryview = b"", flags: int = 0,
        window: int = 256 << 10, forwarded: int = 0, *, cid: int = CID, to: int = 2, kind: int = 1, length: int = -1,
    ) -> None:  # fmt: skip
        """Send a packet; with wrong numbers, on request."""
        while not self.slots:  # without handling anything else: this may be the reply to something
            self.reclaim()
            select.select([self.tx.call], [], [], 0.1)
        slot = self.slots.popleft()
        offset = 0x300000 + slot * (SLOT + 4096)
        address = GUEST + offset
        size = len(data) if length < 0 else length
        packet.HEADER.pack_into(self.memory, offset, cid, to, port, host_port, size, kind, op, flags, window, forwarded)
        if data:
            self.memory[offset + 64 : offset + 64 + len(data)] = data
            self.tx.describe(2 * slot, address, 44, 1, 2 * slot + 1)
            self.tx.describe(2 * slot + 1, address + 64, len(data), 0)
        else:
            self.tx.describe(2 * slot, address, 44, 0)
        self.tx.offer(2 * slot)

    def reclaim(self) -> None:
        for head, _ in self.tx.done():
            self.slots.append(head // 2)

    def process(self) -> None:
        """Handle everything the device has returned."""
        self.reclaim()
        received = self.rx.done()
        for head, length in received:
            header, payload = self.rx_buffers[head]
            self.receive(packet.HEADER.unpack(header), payload[: length - 44])
            if self.feeding:
                self.rx.offer(head, kick=False)
            else:
                self.hungry.append(head)
        if received and self.feeding:
            self.rx.notify(len(received))
        for stream in self.streams.values():
            if stream.out:
                stream.push()

    def receive(self, header: tuple[int, ...], payload: memoryview) -> None:
        source, target, host_port, port, length, _kind, op, flags, window, forwarded = header
        assert (source, target, length) == (2, CID, len(payload))
        if self.handler and self.handler(header):
            return
        stream = self.streams.get((port, host_port))
        if stream is None:
            if op == packet.REQUEST and port in self.accepted:
                stream = self.streams[port, host_port] = Stream(self, port, host_port)
                stream.connected = True
                stream.peer_window = window
                self.accepted[port].append(stream)
                stream.packet(packet.RESPONSE)
            elif op == packet.REQUEST:
                self.packet(packet.RST, port, host_port)
            else:
                self.packets.append(header)
            return
        stream.peer_window, stream.peer_forwarded = window, forwarded | stream.sent & ~packet.COUNTER_MASK
        if op == packet.RESPONSE:
            stream.connected = True
        elif op == packet.RST:
            stream.reset = True
            del self.streams[port, host_port]
        elif op == packet.SHUTDOWN:
            stream.peer_shut |= flags
            if stream.peer_shut == 3 and stream.reading:
                stream.packet(packet.RST)
                del self.streams[port, host_port]
        elif op == packet.CREDIT_REQUEST:
            stream.packet(packet.CREDIT_UPDATE)
        elif op == packet.RW:
            stream.received += length
            assert stream.received - stream.forwarded <= stream.window, "the device exceeded its credit"
            if stream.keep:
                stream.data += payload
            stream.sink(payload)
            if stream.reading:
                stream.forwarded = stream.received
                if stream.forwarded - stream.reported >= stream.window // 2:
                    stream.packet(packet.CREDIT_UPDATE)

    def feed(self) -> None:
        """Add receive buffers again, after ``feeding = False``."""
        self.feeding = True
        while self.hungry:
            self.rx.offer(self.hungry.pop())

    # For tests.

    def listen(self, port: int = AGENT) -> None:
        self.accepted[port] = deque()

    def accept(self, port: int = AGENT) -> Stream:
        self.until(lambda: bool(self.accepted[port]))
        return self.accepted[port].popleft()

    def connect(self, host_port: int, port: int = 5000) -> Stream:
        stream = self.streams[port, host_port] = Stream(self, port, host_port)
        stream.packet(packet.REQUEST)
        self.until(lambda: stream.connected or stream.reset)
        return stream

    def until(self, condition: Callable[[], bool], *others: socket.socket, timeout: float = 20) -> None:
        """Handle packets until the condition holds; ``others`` are descriptors whose readiness may change it."""
        deadline = time.monotonic() + timeout
        self.process()
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, f"nothing happened in {timeout} s; the device reports: {self.backend.lines()}"
            ready, _, _ = select.select([self.rx.call, self.tx.call, *(each.fileno() for each in others)], [], [], left)
            for fd in (self.rx.call, self.tx.call):
                if fd in ready:
                    os.eventfd_read(fd)
            self.process()

    def host_receives(self, sock: socket.socket, size: int) -> bytes:
        """Receive from a host program's socket; less than ``size`` bytes at EOF."""
        data = bytearray()
        ended = False

        def more() -> bool:
            nonlocal ended
            if not select.select([sock], [], [], 0)[0]:
                return False
            try:
                piece = sock.recv(size - len(data))
            except ConnectionResetError:  # closed, with unread data from us
                piece = b""
            data.extend(piece)
            ended = not piece
            return ended or len(data) == size

        self.until(more, sock)
        return bytes(data)

    def ended(self, sock: socket.socket) -> bool:
        """Wait until a host program's socket is closed; return False if data comes first."""
        return self.host_receives(sock, 1) == b""

    def settle(self) -> None:
        """Return once the device has handled everything it was notified of before."""
        for _ in range(2):
            self.ask_u64(p.GET_PROTOCOL_FEATURES)

    def pair(self) -> tuple[socket.socket, Stream]:
        """Open a connection known to both ends: a program that leaves earlier is a different case."""
        sock = self.backend.connect()
        stream = self.accept()
        stream.send(b"!")
        assert self.host_receives(sock, 1) == b"!"
        return sock, stream

    def echo(self, sock: socket.socket, stream: Stream) -> None:
        """Check that a connection works both ways."""
        stream.data.clear()
        sock.sendall(b"ping")
        self.until(lambda: stream.data == b"ping")
        stream.send(b"pong")
        assert self.host_receives(sock, 4) == b"pong"

    def close(self) -> None:
        self.rx.close()
        self.tx.close()
        os.close(self.memfd)


Start = Callable[..., tuple[Backend, Guest]]


@contextmanager
def starter(directory: Path) -> Iterator[Start]:
    """Start the device and a guest that listens on the agent's port; stop both at the end."""
    with ExitStack() as ends:

        def start(*, layout: str = "two", features: int = -1, **limits: float) -> tuple[Backend, Guest]:
            backend = Backend(directory, **limits)
            ends.callback(backend.close)
            guest = Guest(backend, layout=layout, features=features)
            ends.callback(guest.close)
            guest.listen()
            return backend, guest

        yield start

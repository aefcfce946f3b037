"""The rx virtqueue: the guest's receive buffers, and the RSTs and connections that wait for them."""

from __future__ import annotations

from collections import deque

from . import packet
from .limits import DeviceLimits
from .log import RateLimitedLog, describe
from .packet import HEADER, HOST_CID, SIZE
from .ring import Ring, RingError

TYPE_CHECKING = False  # saves importing typing
if TYPE_CHECKING:
    from typing import Protocol
else:
    Protocol = object

#: Maximum pieces of one buffer to use; readv(2) accepts 1024, and 16 buffers are filled at once.
MAX_PIECES = 60


class Buffer:
    """A receive buffer, room for one packet: pieces for the header, pieces for the payload."""

    __slots__ = ("head", "header", "payload", "room")

    def __init__(self, head: int, pieces: list[memoryview]) -> None:
        self.head = head
        self.header: list[memoryview] = []
        missing = SIZE
        for number, piece in enumerate(pieces):
            if len(piece) > missing:
                self.header.append(piece[:missing])
                self.payload = [piece[missing:], *pieces[number + 1 : number + MAX_PIECES]]
                break
            self.header.append(piece)
            missing -= len(piece)
            if not missing:
                self.payload = pieces[number + 1 : number + 1 + MAX_PIECES]
                break
        else:
            raise RingError("rx: a buffer with no room for a header")
        self.room = sum(map(len, self.payload))
        if not self.room:
            raise RingError("rx: a buffer with no room for data")

    def write_header(self, header: bytes) -> None:
        """Write a packet's header into the buffer."""
        if len(self.header) == 1:
            self.header[0][:] = header
            return
        at = 0
        for piece in self.header:
            piece[:] = header[at : at + len(piece)]
            at += len(piece)


class RxBuffers:
    """Receive buffers in the order in which the guest made them available."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._spare: deque[Buffer] = deque()

    def get(self, count: int) -> list[Buffer]:
        """Take up to ``count`` buffers, to be used in order; return the rest with ``unget``.  Raises RingError."""
        spare, pop_available = self._spare, self._ring.pop_available
        while len(spare) < count:
            chain = pop_available()
            if chain is None:
                break
            spare.append(Buffer(*chain))
        return [spare.popleft() for _ in range(min(count, len(spare)))]

    def prefetch(self) -> None:
        """Prepare one buffer, so that less remains to be done when there is something to send.  Raises RingError."""
        if not self._spare:
            chain = self._ring.pop_available()
            if chain is not None:
                self._spare.append(Buffer(*chain))

    def unget(self, buffers: list[Buffer]) -> None:
        """Put back unused buffers, in their order."""
        self._spare.extendleft(reversed(buffers))

    def send(self, buffer: Buffer, header: bytes, payload: int = 0) -> None:
        """Send a packet: ``payload`` bytes of it are already in the buffer."""
        buffer.write_header(header)
        self._ring.add_used(buffer.head, SIZE + payload)

    def wait(self) -> bool:
        """Enable the notification for new buffers; False if there already are some.  Raises RingError."""
        return not self._spare and not self._ring.enable_notifications()

    def rewind(self) -> None:
        """Put prefetched buffers back into the ring, which stops."""
        self._ring.unpop(len(self._spare))
        self._spare.clear()


class RxSender(Protocol):
    """A connection, as seen by the rx queue."""

    guest_port: int
    queued: bool

    def transmit(self, buffers: RxBuffers) -> bool:
        """Send available data, within credit; False if buffers ran out."""

    def watch(self) -> None:
        """Watch the host socket again."""

    def reset(self) -> None:
        """End the connection by RST."""


class RxQueue:
    """Send packets to the guest: RSTs first, then one turn for each queued connection."""

    def __init__(self, ring: Ring, cid: int, log: RateLimitedLog, limits: DeviceLimits) -> None:
        self.buffers = RxBuffers(ring)
        self.moved = 0  # bytes of payload since the device set it to 0
        self._ring = ring
        self._cid = cid
        self._log = log
        self._limits = limits
        self._line: deque[RxSender] = deque()
        self._rsts: deque[bytes] = deque()
        self._drained: list[RxSender] = []  # their sockets seem to be drained

    def enqueue_rx(self, sender: RxSender) -> None:
        """Give a connection a turn at the receive buffers."""
        if not sender.queued:
            sender.queued = True
            self._line.append(sender)

    def watch_later(self, sender: RxSender) -> None:
        """Watch a connection's socket again once the guest has been notified of its data."""
        self._drained.append(sender)

    def queue_rst(self, host_port: int, guest_port: int, kind: int = packet.STREAM) -> None:
        """Send an RST for a pair of ports."""
        header = HEADER.pack(HOST_CID, self._cid, host_port, guest_port, 0, kind, packet.RST, 0, 0, 0)
        self._rsts.append(header)

    def full(self) -> bool:
        """Return whether too many RSTs are waiting for buffers, so that the guest must first make some available."""
        return len(self._rsts) >= self._limits.pending_rsts

    def clear(self) -> None:
        """Drop everything queued: the guest no longer knows any connection."""
        self._rsts.clear()
        for sender in self._line:
            sender.queued = False
        self._line.clear()

    def process_rx(self) -> bool:
        """Send packets for a while; True if there is more to send.  Raises RingError."""
        buffers = self.buffers
        for _ in range(self._limits.batch):
            if self._rsts:
                found = buffers.get(1)
                sent = bool(found)
                if sent:
                    buffers.send(found[0], self._rsts.popleft())
            elif self._line:
                sent = self._serve_next()
            else:
                return False
            self._ring.publish_and_notify()
            while self._drained:  # only now: the guest is busy meanwhile
                self._drained.pop().watch()
            if not sent and buffers.wait():
                return False  # until a kick
        return bool(self._rsts or self._line)

    def _serve_next(self) -> bool:
        sender = self._line.popleft()
        sender.queued = False
        try:
            sent = sender.transmit(self.buffers)
        except RingError:
            raise
        except Exception as error:
            self._log(f"connection to the guest's port {sender.guest_port}: {describe(error)}")
            sender.reset()
            return True
        if not sent and not sender.queued:
            sender.queued = True
            self._line.appendleft(sender)
        return sent

"""The device: two virtqueues, and the guest's packets dispatched to connections (virtio 1.2, section 5.10)."""

from __future__ import annotations

import socket
from collections.abc import Callable

from . import packet
from .connection import ConnectionProtocolError
from .limits import DeviceLimits
from .log import RateLimitedLog, describe
from .loop import Loop
from .memory import Memory
from .packet import HEADER, HOST_CID, bytes_after, first_bytes
from .ring import Ring, RingError
from .rx import RxQueue
from .table import ConnectionTable


class VsockDevice:
    """The state of one vsock device; ``dial`` is ConnectionTable's."""

    def __init__(
        self, cid: int, loop: Loop, log: RateLimitedLog, limits: DeviceLimits, dial: Callable[[int], socket.socket]
    ) -> None:
        self.cid = cid
        self.rx = Ring("rx", writable=True)
        self.tx = Ring("tx", writable=False)
        self._loop = loop
        self._log = log
        self._limits = limits
        self._rx_queue = RxQueue(self.rx, cid, log, limits)
        self._connections = ConnectionTable(cid, self._rx_queue, loop, log, limits, dial)
        self._running = False
        self._broken = False
        self._tx_pending = False  # packets wait in the tx ring
        self._notifications_off = False  # the guest would not notify us of a packet
        self._publish_timer = False  # set for used tx chains
        self._unpublished_bytes = 0  # of data in them

    # Host programs.

    def has_room(self, others: int = 0) -> bool:
        """Return whether another host socket may be held, beside the connections and ``others``."""
        return self._connections.has_room(others)

    def connect(self, sock: socket.socket, port: int, *, greet: bool) -> None:
        """Connect a host program's socket, ours from here, to a port of the guest; waits for the guest's driver."""
        if self._broken:
            sock.close()
        else:
            self._connections.connect(sock, port, greet=greet)

    def drop_connections(self) -> None:
        """End all connections: the guest was reset."""
        self._connections.drop_all()

    # The virtqueues.

    def start(self, ring: Ring, memory: Memory, *, event_idx: bool, indirect: bool) -> None:
        """Start a ring; the device runs when both do."""
        self._broken = False
        try:
            ring.start(memory, event_idx=event_idx, indirect=indirect)
        except RingError as error:
            self._break(ring, error)
            return
        if not self._running and self.rx.running and self.tx.running:
            self._running = True
            self._tx_pending = True
            self._connections.resume()

    def stop(self, ring: Ring) -> int:
        """Stop a ring; connections stay, as it may resume.  Returns its position."""
        self._running = self._connections.running = False
        if ring is self.rx and ring.running:
            self._rx_queue.buffers.rewind()
        return ring.stop()

    def remap(self, memory: Memory) -> None:
        """Use another memory table while the rings run."""
        for ring in (self.rx, self.tx):
            if ring.running:
                if ring is self.rx:
                    self._rx_queue.buffers.rewind()
                try:
                    ring.map(memory)
                except RingError as error:
                    self._break(ring, error)

    def kicked(self, ring: Ring) -> None:
        """Record that the guest made something available; the next turn looks."""
        if ring is self.tx:
            self._tx_pending = True
        elif ring.running:
            ring.disable_notifications()  # until the next time that buffers are missing

    def _break(self, ring: Ring, error: Exception) -> None:
        self._log(f"the guest broke its {ring.name} ring, the device is off until the guest restarts it: {error}")
        for each in (self.rx, self.tx):
            self.stop(each)
        ring.fail()
        self._broken = True
        self._connections.drop_all()
        self._connections.close_waiting()

    # The loop's work.

    def process(self) -> bool:
        """Move packets in both directions for a while; True if there is more to do immediately."""
        if not self._running:
            return False
        ring = self.tx
        queue = self._rx_queue
        try:
            queue.moved = 0
            if self._tx_pending or self.tx.has_available():
                self.process_tx()
            ring = self.rx
            publish = self._may_publish()
            if publish:  # seen with what it is interrupted for below, it mostly needs no interrupt of its own
                self.tx.publish_used()
            more = queue.process_rx()
            if publish:
                self.tx.notify()
            if not more:
                queue.buffers.prefetch()
        except RingError as error:
            self._break(ring, error)
            return False
        return more or (self._tx_pending and not queue.full())

    def worth_polling(self) -> bool:
        """Return whether the last turn moved messages, not bulk data."""
        return self._rx_queue.moved <= self._limits.busy_poll_bytes

    def has_available(self) -> bool:
        """Return whether the guest has sent something without a notification."""
        return self._running and not self._tx_pending and self.tx.has_available()

    def enable_notifications(self) -> bool:
        """Enable notifications from the guest; True if it has already sent something."""
        if not self._running or self._tx_pending or not self._notifications_off:
            return False
        self._notifications_off = False
        try:
            self._tx_pending = self.tx.enable_notifications()
        except RingError as error:
            self._break(self.tx, error)
        return self._tx_pending

    def _may_publish(self) -> bool:
        """Return whether to publish used tx chains now: in batches, the rest after a while."""
        count = self.tx.unpublished()
        limits = self._limits
        if count >= min(limits.unpublished, self.tx.size // 4) or self._unpublished_bytes > limits.unpublished_bytes:
            self._unpublished_bytes = 0
            return True
        if count and not self._publish_timer:
            self._publish_timer = True
            self._loop.after(limits.publish_delay, self._publish_rest)
        return False

    def _publish_rest(self) -> None:
        self._publish_timer = False
        self._unpublished_bytes = 0
        if self.tx.running:
            self.tx.publish_and_notify()

    # The guest's packets.

    def process_tx(self) -> None:
        """Process packets from the guest.  Stops while RSTs pile up for lack of rx buffers.  Raises RingError."""
        tx = self.tx
        tx.disable_notifications()
        self._tx_pending = self._notifications_off = True
        for _ in range(self._limits.batch):
            if self._rx_queue.full():
                break
            chain = tx.pop_available()
            if chain is None:
                self._tx_pending = False
                break
            try:
                self._packet(chain[1])
            except Exception as error:
                self._log(f"a packet could not be processed: {describe(error)}")
            tx.add_used(chain[0], 0)

    def _packet(self, pieces: list[memoryview]) -> None:
        if not pieces or len(pieces[0]) < packet.SIZE:
            # A header in pieces: put it together.
            whole = b"".join(first_bytes(pieces, packet.SIZE))
            if len(whole) < packet.SIZE:
                self._log("the guest sent a packet shorter than its header")
                return
            pieces = [memoryview(whole), *bytes_after(pieces, packet.SIZE)]
        # Taken out of shared memory once.
        header = HEADER.unpack_from(pieces[0])
        source, target, guest_port, host_port, length, kind, op, flags, buf_alloc, fwd_cnt = header
        if source != self.cid or target != HOST_CID:
            self._log(f"the guest sent a packet from CID {source} to CID {target}")
            return
        if kind != packet.STREAM:
            if op != packet.RST:
                self._rx_queue.queue_rst(host_port, guest_port, kind)
            return
        connection = self._connections.find(host_port, guest_port)
        if connection is None:
            if op == packet.REQUEST:
                self._connections.accept(host_port, guest_port, buf_alloc, fwd_cnt)
            elif op != packet.RST:
                self._rx_queue.queue_rst(host_port, guest_port)
            return
        if op == packet.RST:
            self._connections.remove(connection)
            return
        try:
            connection.update_credit(buf_alloc, fwd_cnt)
            payload: list[memoryview] = []
            if op == packet.RW and length:
                payload = bytes_after(pieces, packet.SIZE)
                if len(payload) != 1 or len(payload[0]) != length:
                    if length > sum(map(len, payload)):
                        raise ConnectionProtocolError(f"{length} bytes announced, {sum(map(len, payload))} sent")
                    payload = first_bytes(payload, length)
                self._unpublished_bytes += length
                self._rx_queue.moved += length
            connection.handle(op, flags, payload, length)
        except ConnectionProtocolError as error:
            self._log(f"the guest broke a connection, its port {guest_port} to port {host_port}: {error}")
            connection.reset()
        except Exception:
            connection.reset()
            raise

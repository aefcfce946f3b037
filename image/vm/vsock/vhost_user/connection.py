"""One stream: a socket of a host program, a pair of ports, the credit of both directions (virtio 1.2, 5.10.6.3 to .6).

Nothing is buffered here towards the guest: bytes go from the socket straight into receive buffers, within the guest's
credit.  For the way to the host see ``sink``.
"""

from __future__ import annotations

import os
import select
import socket

from . import packet
from .limits import BufferPool, DeviceLimits
from .log import RateLimitedLog, describe
from .loop import Loop, Timer
from .packet import COUNTER_MASK, HEADER, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND, first_bytes
from .rx import Buffer, RxBuffers, RxQueue
from .sink import Sink

TYPE_CHECKING = False  # saves importing typing
if TYPE_CHECKING:
    from typing import Protocol
else:
    Protocol = object

# States.  A connection has a port pair, and is in the table, from REQUESTED to CLOSING.
WAITING = "waiting"  # for the guest's driver
REQUESTED = "requested"
CONNECTED = "connected"
CLOSING = "closing"  # shut down and the socket closed; waiting for the guest's RST
DRAINING = "draining"  # the guest has closed it; the host program has not read everything
CLOSED = "closed"

HANG_UP = select.EPOLLHUP | select.EPOLLERR
READABLE = select.EPOLLIN | select.EPOLLRDHUP | HANG_UP
# Edge-triggered: no system calls to toggle interest while credit or buffers are missing.
MASK = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
MAX_BATCH = 16


class ConnectionProtocolError(Exception):
    """The guest broke the rules of one stream."""


class Owner(Protocol):
    """The interface of its table that a connection needs."""

    cid: int
    loop: Loop
    log: RateLimitedLog
    limits: DeviceLimits
    pool: BufferPool
    rx: RxQueue
    running: bool

    def reset(self, connection: VsockConnection) -> None:
        """End a connection, by RST if the guest knows of it."""

    def closed(self, connection: VsockConnection, granted: int) -> None:
        """Remove a connection that has closed its socket, returning ``granted`` bytes of buf_alloc."""


class VsockConnection:
    """A stream.  ``greet``: the host program expects ``OK <port>`` when the guest has accepted."""

    def __init__(
        self, table: Owner, sock: socket.socket, guest_port: int, *, from_guest: bool, greet: bool = False
    ) -> None:
        sock.setblocking(False)
        self._table = table
        self._rx = table.rx
        self._loop = table.loop
        self._log = table.log
        self._limits = table.limits
        self._sock = sock
        self.fd = sock.fileno()
        self.guest_port = guest_port
        self.host_port = 0
        self.from_guest = from_guest
        self.state = WAITING
        self.queued = False  # in the line for receive buffers
        self._greet = greet
        self._timer: Timer | None = None
        # Towards the guest.
        self._readable = False
        self._eof = False
        self._hang_up = False  # the host program has closed its socket
        self._batch = 1  # receive buffers to fill at once
        self._tx_cnt = 0
        self._peer_buf_alloc = 0
        self._peer_fwd_cnt = 0
        self._pending_op = 0  # REQUEST, RESPONSE or CREDIT_UPDATE to be sent
        self._pending_flags = 0  # SHUTDOWN flags to be sent
        self._sent_flags = 0  # SHUTDOWN flags that were sent
        # Towards the host.
        self._sink = Sink(self.fd, table.limits.buf_alloc)
        self._granted = 0
        self._host_is_full = False
        self._guest_flags = 0
        table.loop.add(self.fd, MASK, self._ready, self._broken)

    # Opening.

    def request(self, host_port: int) -> None:
        """Send REQUEST."""
        self.host_port = host_port
        self.state = REQUESTED
        self._pending_op = packet.REQUEST
        self._timer = self._loop.after(self._limits.response_timeout, self._unanswered)
        self._rx.enqueue_rx(self)

    def accept(self, host_port: int) -> None:
        """Send RESPONSE to the guest's REQUEST."""
        self.host_port = host_port
        self.state = CONNECTED
        self._pending_op = packet.RESPONSE
        self._rx.enqueue_rx(self)

    def _unanswered(self) -> None:
        if not self._table.running:
            self._timer = self._loop.after(self._limits.response_timeout, self._unanswered)
        else:
            self._log(f"the guest did not answer a connection to its port {self.guest_port}")
            self.reset()

    # From the guest.

    def update_credit(self, buf_alloc: int, fwd_cnt: int) -> None:
        """Take buf_alloc and fwd_cnt of a packet: the guest's receive buffer."""
        if (fwd_cnt - self._peer_fwd_cnt) & COUNTER_MASK <= (self._tx_cnt - self._peer_fwd_cnt) & COUNTER_MASK:
            # Otherwise it is stale (two of the guest's CPUs), or false: ignore it.
            self._peer_fwd_cnt = fwd_cnt
        self._peer_buf_alloc = buf_alloc
        if self._readable and not self.queued and self.state == CONNECTED:
            self._rx.enqueue_rx(self)

    def handle(self, op: int, flags: int, pieces: list[memoryview], length: int) -> None:
        """Handle a packet for this port pair, except RST.  Raises ConnectionProtocolError."""
        if op == packet.RW:
            if self.state == CONNECTED:
                self._data(pieces, length)
            elif self.state == REQUESTED:
                raise ConnectionProtocolError("data before the connection was accepted")
        elif op == packet.CREDIT_UPDATE:
            pass
        elif op == packet.CREDIT_REQUEST:
            if self.state == CONNECTED:
                self._queue_op(packet.CREDIT_UPDATE)
        elif op == packet.SHUTDOWN:
            self._shutdown(flags)
        elif op == packet.RESPONSE and self.state == REQUESTED:
            self._accepted()
        else:
            raise ConnectionProtocolError(f"operation {op} while {self.state}")
        if self.state == CONNECTED:
            self._update_guest_credit()

    def detach(self) -> None:
        """Release the pair of ports: the guest has closed.  Data for the host program to read outlives that."""
        if self.state == CLOSING:  # the socket is closed, and its number may be reused by now
            self.close()
            return
        self.state = DRAINING
        self._cancel()
        if not self._sink.pending:
            self.close()

    def _accepted(self) -> None:
        self._cancel()
        self.state = CONNECTED
        if self._greet:
            line = b"OK %d\n" % self.host_port
            try:
                whole = os.write(self.fd, line) == len(line)
            except OSError:
                whole = False
            if not whole and not self._hang_up:
                self.reset()
                return
        if self._hang_up:
            self._linger()
        # Data may have arrived before, for example after the CONNECT line.
        self._readable = True
        self._rx.enqueue_rx(self)

    def _data(self, pieces: list[memoryview], length: int) -> None:
        if self._guest_flags & SHUTDOWN_SEND:
            raise ConnectionProtocolError("data after its end")
        if length > self._sink.credit():
            raise ConnectionProtocolError(f"{length} bytes of data with a credit of {self._sink.credit()}")
        if length and not self._sink.write(pieces, length):
            self._shut_receiving()
        if self._sink.pending and not self._host_is_full:
            self._host_is_full = True
            self._set_mask()

    def _shutdown(self, flags: int) -> None:
        self._guest_flags |= flags & SHUTDOWN_BOTH
        if self._guest_flags == SHUTDOWN_BOTH or self.state != CONNECTED:
            # The guest has closed.  Answer at once: data pending for the host needs no port pair.
            self.reset()
        elif self._guest_flags & SHUTDOWN_RCV:
            self._shut(socket.SHUT_RD)
            self._shut_sending()
        elif self._guest_flags & SHUTDOWN_SEND and not self._sink.pending:
            self._shut(socket.SHUT_WR)

    # From the host.

    def _ready(self, mask: int) -> None:
        state = self.state
        if mask & HANG_UP:
            self._hang_up = True
            if state == WAITING or (state == REQUESTED and not self._unread()):
                self.reset()  # it has given up
                return
            if state == DRAINING:
                self.close()
                return
            self._shut_receiving()
            if state == CONNECTED and self._timer is None:
                self._linger()
        if mask & select.EPOLLOUT and self._sink.pending:
            self._flush()
        if mask & READABLE:
            self._readable = True
            if self.state == CONNECTED and not self.queued:
                self._rx.enqueue_rx(self)

    def _broken(self, error: Exception) -> None:
        self._log(f"connection to the guest's port {self.guest_port}: {describe(error)}")
        self.reset()

    def _flush(self) -> None:
        if not self._sink.flush():
            self._shut_receiving()
        elif not self._sink.pending:
            if self.state == DRAINING:
                self.close()
                return
            self._host_is_full = False
            self._set_mask()
            if self._guest_flags & SHUTDOWN_SEND:
                self._shut(socket.SHUT_WR)
        if self.state == CONNECTED:
            self._update_guest_credit()

    def _shut_receiving(self) -> None:
        """Send SHUTDOWN(RCV): the host program receives no more, and what the guest sends is lost."""
        self._sink.discard()
        if self.state == DRAINING:
            self.close()
        else:
            self._queue_shutdown(SHUTDOWN_RCV)

    def _shut_sending(self) -> None:
        """Send SHUTDOWN(SEND): the guest gets no more from the host program."""
        self._eof = True
        self._readable = False
        self._queue_shutdown(SHUTDOWN_SEND)

    def _linger(self) -> None:
        """Limit the time for the guest to accept the last data of a closed host program, if it accepts none."""
        sent = self._tx_cnt

        def check_progress() -> None:
            if self._table.running and self._tx_cnt == sent:
                self.reset()
            else:
                self._linger()

        self._timer = self._loop.after(self._limits.linger_timeout, check_progress)

    def _unread(self) -> bool:
        try:
            return bool(self._sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _shut(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError:
            pass  # it is gone already

    # To the guest.

    def transmit(self, buffers: RxBuffers) -> bool:
        """Take a turn at the receive buffers; False if they ran out.  Raises RingError."""
        if self._pending_op and self.state in (REQUESTED, CONNECTED):
            found = buffers.get(1)
            if not found:
                return False
            op, self._pending_op = self._pending_op, 0
            buffers.send(found[0], self._header(op))
        if self.state != CONNECTED:
            return True
        if self._readable and not self._eof and not self._transmit_data(buffers):
            return False
        flags = self._sent_flags | self._pending_flags
        if flags != self._sent_flags:
            found = buffers.get(1)
            if not found:
                return False
            self._sent_flags = flags
            buffers.send(found[0], self._header(packet.SHUTDOWN, flags=flags))
            if flags == SHUTDOWN_BOTH:
                self._close_host()
        return True

    def _transmit_data(self, buffers: RxBuffers) -> bool:
        credit = self._peer_buf_alloc - ((self._tx_cnt - self._peer_fwd_cnt) & COUNTER_MASK)
        if credit <= 0:
            return True  # the guest's next packet resumes this
        found = buffers.get(self._batch)
        if not found:
            return False
        if len(found) == 1:
            pieces, room = found[0].payload, found[0].room
        else:
            pieces = [piece for buffer in found for piece in buffer.payload]
            room = sum([buffer.room for buffer in found])
        if room > credit:
            pieces, room = first_bytes(pieces, credit), credit
        try:
            done = os.readv(self.fd, pieces)
        except BlockingIOError:
            buffers.unget(found)
            self._readable = False
            return True
        except OSError:  # ECONNRESET: it closed without reading everything
            done = 0
        if not done:
            buffers.unget(found)
            self._shut_sending()
            return True
        self._tx_cnt = (self._tx_cnt + done) & COUNTER_MASK
        self._rx.moved += done
        self._send_filled(buffers, found, done)
        if done == room:
            self._batch = min(2 * self._batch, MAX_BATCH)
        else:
            self._batch = 1
            if not self._hang_up:
                self._readable = False
                self._rx.watch_later(self)
                return True
        self._rx.enqueue_rx(self)
        return True

    def watch(self) -> None:
        """Watch a drained socket.  Setting the edge trigger again reports data that arrived since, or the end."""
        if self.state in (CONNECTED, DRAINING):
            self._set_mask()

    def _set_mask(self) -> None:
        # Only while something is pending: otherwise each read of the host program would wake us.
        self._loop.change(self.fd, MASK | select.EPOLLOUT if self._host_is_full else MASK)

    def _send_filled(self, buffers: RxBuffers, found: list[Buffer], size: int) -> None:
        header, filled = b"", 0
        for number, buffer in enumerate(found):
            part = min(buffer.room, size)
            if part != filled:
                header, filled = self._header(packet.RW, part), part
            buffers.send(buffer, header, part)
            size -= part
            if not size:
                buffers.unget(found[number + 1 :])
                return

    def _header(self, op: int, length: int = 0, flags: int = 0) -> bytes:
        sink = self._sink
        sink.reported_fwd_cnt = sink.fwd_cnt
        addresses = (packet.HOST_CID, self._table.cid, self.host_port, self.guest_port)
        return HEADER.pack(*addresses, length, packet.STREAM, op, flags, sink.buf_alloc, sink.fwd_cnt)

    def _queue_op(self, op: int) -> None:
        if not self._pending_op:  # a pending RESPONSE contains everything that a CREDIT_UPDATE does
            self._pending_op = op
        self._rx.enqueue_rx(self)

    def _queue_shutdown(self, flags: int) -> None:
        self._pending_flags |= flags
        self._rx.enqueue_rx(self)

    def _update_guest_credit(self) -> None:
        if self._sink.update_due(self._peer_buf_alloc):
            if not self._granted:
                self._granted = self._table.pool.allocate()
                self._sink.buf_alloc += self._granted
            self._queue_op(packet.CREDIT_UPDATE)

    # The end.

    def _close_host(self) -> None:
        """Close the socket after SHUTDOWN(RCV|SEND): it is not needed while the guest's RST is awaited."""
        self.state = CLOSING
        self._loop.remove(self.fd)
        self._sock.close()
        self._cancel()
        self._timer = self._loop.after(self._limits.close_timeout, self._unconfirmed)

    def _unconfirmed(self) -> None:
        if self._table.running:
            self.reset()
        else:
            self._timer = self._loop.after(self._limits.close_timeout, self._unconfirmed)

    def reset(self) -> None:
        """End it, by RST if the guest knows of it."""
        self._table.reset(self)

    def close(self) -> None:
        """Close the host's socket, at once.  The table calls this after removing it."""
        if self.state != CLOSED:
            if self.state != CLOSING:
                self._loop.remove(self.fd)
                self._sock.close()
            self.state = CLOSED
            self._cancel()
            self._sink.pending.clear()
            self._table.closed(self, self._granted)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

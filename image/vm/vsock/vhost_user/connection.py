"""One stream: a socket of a host program, a pair of ports, the credit of both directions (virtio 1.2, 5.10.6.3 to .6).

Towards the guest nothing is buffered here: bytes go from the socket straight into receive buffers, as far as the
guest's credit goes.  For the way to the host see ``sink``.
"""

from __future__ import annotations

import os
import select
import socket

from . import packet
from .loop import Timer, describe
from .packet import COUNT, HEADER, NO_RECEIVE, NO_SEND, NOTHING_MORE, cut
from .receive import Buffer, Receiver
from .sink import Sink

TYPE_CHECKING = False  # saves importing typing
if TYPE_CHECKING:
    from .device import Device

# States.  A connection has a port pair, and is in the device's table, from REQUESTED to CLOSING.
WAITING = "waiting"  # for the guest's driver
REQUESTED = "requested"
CONNECTED = "connected"
CLOSING = "closing"  # all said and the socket closed; the guest's RST is missing
FLUSHING = "flushing"  # the guest is done with it; the host program has not read everything
CLOSED = "closed"

HANG_UP = select.EPOLLHUP | select.EPOLLERR
READABLE = select.EPOLLIN | select.EPOLLRDHUP | HANG_UP
# Edge-triggered: no system calls to switch interest off and on while credit or buffers are missing.
MASK = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
MAX_BATCH = 16


class Violation(Exception):
    """The guest broke the rules of one stream."""


class Connection:
    """See the module.  ``greet``: the host program expects ``OK <port>`` when the guest has accepted."""

    def __init__(
        self, device: Device, sock: socket.socket, guest_port: int, *, from_guest: bool, greet: bool = False
    ) -> None:
        sock.setblocking(False)
        self._device = device
        self._sock = sock
        self.fd = sock.fileno()
        self.guest_port = guest_port
        self.host_port = 0
        self.from_guest = from_guest
        self.state = WAITING
        self.queued = False  # in the device's line for receive buffers
        self._greet = greet
        self._timer: Timer | None = None
        # Towards the guest.
        self._readable = False
        self._eof = False
        self._hang_up = False  # the host program has closed its socket
        self._batch = 1  # receive buffers to fill at once
        self._sent = 0
        self._peer_window = 0
        self._peer_forwarded = 0
        self._owed = 0  # REQUEST, RESPONSE or CREDIT_UPDATE to be sent
        self._to_say = 0  # SHUTDOWN flags to be sent
        self._said = 0  # SHUTDOWN flags that were sent
        # Towards the host.
        self._sink = Sink(self.fd, device.limits.window)
        self._granted = 0
        self._host_is_full = False
        self._guest_said = 0
        device.loop.add(self.fd, MASK, self._ready, self._broken)

    # Opening.

    def request(self, host_port: int) -> None:
        """Ask the guest for the connection."""
        self.host_port = host_port
        self.state = REQUESTED
        self._owed = packet.REQUEST
        self._timer = self._device.loop.after(self._device.limits.answer, self._unanswered)
        self._device.line_up(self)

    def accept(self, host_port: int) -> None:
        """Tell the guest that its request was accepted."""
        self.host_port = host_port
        self.state = CONNECTED
        self._owed = packet.RESPONSE
        self._device.line_up(self)

    def _unanswered(self) -> None:
        if not self._device.running:
            self._timer = self._device.loop.after(self._device.limits.answer, self._unanswered)
        else:
            self._device.log(f"the guest did not answer a connection to its port {self.guest_port}")
            self._device.reset(self)

    # From the guest.

    def credit(self, window: int, forwarded: int) -> None:
        """What every packet says about the guest's receive buffer."""
        if (forwarded - self._peer_forwarded) & COUNT <= (self._sent - self._peer_forwarded) & COUNT:
            # Else it is older than one before (two of the guest's CPUs), or a lie: nothing is gained by believing it.
            self._peer_forwarded = forwarded
        self._peer_window = window
        if self._readable and not self.queued and self.state == CONNECTED:
            self._device.line_up(self)

    def handle(self, op: int, flags: int, pieces: list[memoryview], length: int) -> None:
        """Handle a packet for this port pair, except RST.  Raises Violation."""
        if op == packet.RW:
            if self.state == CONNECTED:
                self._data(pieces, length)
            elif self.state == REQUESTED:
                raise Violation("data before the connection was accepted")
        elif op == packet.CREDIT_UPDATE:
            pass
        elif op == packet.CREDIT_REQUEST:
            if self.state == CONNECTED:
                self._owe(packet.CREDIT_UPDATE)
        elif op == packet.SHUTDOWN:
            self._shutdown(flags)
        elif op == packet.RESPONSE and self.state == REQUESTED:
            self._accepted()
        else:
            raise Violation(f"operation {op} while {self.state}")
        if self.state == CONNECTED:
            self._report()

    def detach(self) -> None:
        """The guest is done with it, and the port pair free: what the host program has still to read outlives that."""
        if self.state == CLOSING:  # the socket is closed already, and its number may be another's by now
            self.close()
            return
        self.state = FLUSHING
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
                self._device.reset(self)
                return
        if self._hang_up:
            self._linger()
        # Data may have come before, behind the CONNECT line for example.
        self._readable = True
        self._device.line_up(self)

    def _data(self, pieces: list[memoryview], length: int) -> None:
        if self._guest_said & NO_SEND:
            raise Violation("data after its end")
        if length > self._sink.credit():
            raise Violation(f"{length} bytes of data with a credit of {self._sink.credit()}")
        if length and not self._sink.write(pieces, length):
            self._host_refuses()
        if self._sink.pending and not self._host_is_full:
            self._host_is_full = True
            self._set_mask()

    def _shutdown(self, flags: int) -> None:
        self._guest_said |= flags & NOTHING_MORE
        if self._guest_said == NOTHING_MORE or self.state != CONNECTED:
            # The guest has closed.  Answered at once: what is pending for the host needs no port pair.
            self._device.reset(self)
        elif self._guest_said & NO_RECEIVE:
            self._shut(socket.SHUT_RD)
            self._ended()
        elif self._guest_said & NO_SEND and not self._sink.pending:
            self._shut(socket.SHUT_WR)

    # From the host.

    def _ready(self, mask: int) -> None:
        state = self.state
        if mask & HANG_UP:
            self._hang_up = True
            if state == WAITING or (state == REQUESTED and not self._unread()):
                self._device.reset(self)  # it has given up
                return
            if state == FLUSHING:
                self.close()
                return
            self._host_refuses()
            if state == CONNECTED and self._timer is None:
                self._linger()
        if mask & select.EPOLLOUT and self._sink.pending:
            self._flush()
        if mask & READABLE:
            self._readable = True
            if self.state == CONNECTED and not self.queued:
                self._device.line_up(self)

    def _broken(self, error: Exception) -> None:
        self._device.log(f"connection to the guest's port {self.guest_port}: {describe(error)}")
        self._device.reset(self)

    def _flush(self) -> None:
        if not self._sink.flush():
            self._host_refuses()
        elif not self._sink.pending:
            if self.state == FLUSHING:
                self.close()
                return
            self._host_is_full = False
            self._set_mask()
            if self._guest_said & NO_SEND:
                self._shut(socket.SHUT_WR)
        if self.state == CONNECTED:
            self._report()

    def _host_refuses(self) -> None:
        """The host program receives no more: what the guest sends is lost, and it should know."""
        self._sink.discard()
        if self.state == FLUSHING:
            self.close()
        else:
            self._say(NO_RECEIVE)

    def _ended(self) -> None:
        """The guest will get no more from the host program."""
        self._eof = True
        self._readable = False
        self._say(NO_SEND)

    def _linger(self) -> None:
        """The host program is gone, the guest has still to take its last data: not for ever, if it takes none."""
        sent = self._sent

        def look() -> None:
            if self._device.running and self._sent == sent:
                self._device.reset(self)
            else:
                self._linger()

        self._timer = self._device.loop.after(self._device.limits.linger, look)

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

    def emit(self, receiver: Receiver) -> bool:
        """Have a turn at the receive buffers; False if they ran out.  Raises RingError."""
        if self._owed and self.state in (REQUESTED, CONNECTED):
            buffers = receiver.get(1)
            if not buffers:
                return False
            op, self._owed = self._owed, 0
            receiver.send(buffers[0], self._header(op))
        if self.state != CONNECTED:
            return True
        if self._readable and not self._eof and not self._send(receiver):
            return False
        flags = self._said | self._to_say
        if flags != self._said:
            buffers = receiver.get(1)
            if not buffers:
                return False
            self._said = flags
            receiver.send(buffers[0], self._header(packet.SHUTDOWN, flags=flags))
            if flags == NOTHING_MORE:
                self._close_host()
        return True

    def _send(self, receiver: Receiver) -> bool:
        credit = self._peer_window - ((self._sent - self._peer_forwarded) & COUNT)
        if credit <= 0:
            return True  # the guest's next packet brings us back
        buffers = receiver.get(self._batch)
        if not buffers:
            return False
        if len(buffers) == 1:
            pieces, room = buffers[0].payload, buffers[0].room
        else:
            pieces = [piece for buffer in buffers for piece in buffer.payload]
            room = sum([buffer.room for buffer in buffers])
        if room > credit:
            pieces, room = cut(pieces, credit), credit
        try:
            done = os.readv(self.fd, pieces)
        except BlockingIOError:
            receiver.unget(buffers)
            self._readable = False
            return True
        except OSError:  # ECONNRESET: it closed without reading everything
            done = 0
        if not done:
            receiver.unget(buffers)
            self._ended()
            return True
        self._sent = (self._sent + done) & COUNT
        self._device.moved += done
        self._hand_over(receiver, buffers, done)
        if done == room:
            self._batch = min(2 * self._batch, MAX_BATCH)
        else:
            self._batch = 1
            if not self._hang_up:
                self._readable = False
                self._device.emptied(self)
                return True
        self._device.line_up(self)
        return True

    def watch(self) -> None:
        """Emptied, it seems.  Set again, the edge trigger tells if not: more, or the end, may have come since."""
        if self.state in (CONNECTED, FLUSHING):
            self._set_mask()

    def _set_mask(self) -> None:
        # Only while something is pending: else each read of the host program would wake us.
        self._device.loop.change(self.fd, MASK | select.EPOLLOUT if self._host_is_full else MASK)

    def _hand_over(self, receiver: Receiver, buffers: list[Buffer], size: int) -> None:
        header, filled = b"", 0
        for number, buffer in enumerate(buffers):
            part = min(buffer.room, size)
            if part != filled:
                header, filled = self._header(packet.RW, part), part
            receiver.send(buffer, header, part)
            size -= part
            if not size:
                receiver.unget(buffers[number + 1 :])
                return

    def _header(self, op: int, length: int = 0, flags: int = 0) -> bytes:
        sink = self._sink
        sink.reported = sink.taken
        addresses = (packet.HOST_CID, self._device.cid, self.host_port, self.guest_port)
        return HEADER.pack(*addresses, length, packet.STREAM, op, flags, sink.window, sink.taken)

    def _owe(self, op: int) -> None:
        if not self._owed:  # a RESPONSE not yet sent says all that a CREDIT_UPDATE says
            self._owed = op
        self._device.line_up(self)

    def _say(self, flags: int) -> None:
        self._to_say |= flags
        self._device.line_up(self)

    def _report(self) -> None:
        if self._sink.report_due(self._peer_window):
            if not self._granted:
                self._granted = self._device.pool.grant()
                self._sink.window += self._granted
            self._owe(packet.CREDIT_UPDATE)

    # The end.

    def _close_host(self) -> None:
        """All was said in both directions: the socket is not needed while the guest's RST is awaited."""
        self.state = CLOSING
        self._device.loop.remove(self.fd)
        self._sock.close()
        self._cancel()
        self._timer = self._device.loop.after(self._device.limits.close, self._unconfirmed)

    def _unconfirmed(self) -> None:
        if self._device.running:
            self._device.reset(self)
        else:
            self._timer = self._device.loop.after(self._device.limits.close, self._unconfirmed)

    def close(self) -> None:
        """Close the host's socket, at once.  The device calls this after taking it out of its table."""
        if self.state != CLOSED:
            if self.state != CLOSING:
                self._device.loop.remove(self.fd)
                self._sock.close()
            self.state = CLOSED
            self._cancel()
            self._sink.pending.clear()
            self._device.closed(self, self._granted)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

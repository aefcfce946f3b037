"""The device: the guest's packets to connections, connections' packets to the guest (virtio 1.2, section 5.10)."""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Callable

from . import packet
from .connection import WAITING, Connection, Violation
from .limits import Limits, Pool
from .log import Log
from .loop import Loop, describe
from .memory import Memory
from .packet import HEADER, HOST_CID, behind, cut
from .receive import Receiver
from .ring import Ring, RingError

#: Ports of ours for connections that the host opens.
FIRST_PORT = 1 << 30
LAST_PORT = (1 << 31) - 1


class Device:
    """The state of one vsock device.

    ``dial`` opens a socket to the host program that a port number in a guest's request stands for, or raises OSError.
    """

    def __init__(self, cid: int, loop: Loop, log: Log, limits: Limits, dial: Callable[[int], socket.socket]) -> None:
        self.cid = cid
        self.loop = loop
        self.log = log
        self.limits = limits
        self.pool = Pool(limits)
        self.rx = Ring("rx", writable=True)
        self.tx = Ring("tx", writable=False)
        self.running = False
        self.moved = 0  # bytes of data in the last turn, both ways
        self._broken = False
        self._dial = dial
        self._receiver = Receiver(self.rx)
        self._table: dict[tuple[int, int], Connection] = {}  # by the host's and the guest's port
        self._waiting: dict[Connection, None] = {}  # for the driver, in order of arrival
        self._line: deque[Connection] = deque()  # for receive buffers
        self._refusals: deque[bytes] = deque()  # RSTs
        self._emptied: list[Connection] = []  # their sockets have nothing more to read, it seems
        self._packets_wait = False
        self._untold = False  # the guest would not tell of a packet
        self._returning = False  # a timer is set for what was taken from the tx ring
        self._kept_bytes = 0  # of data in it
        self._count = 0
        self._count_from_guest = 0
        # Not where a device before this one began: the guest may remember connections of that one's.
        self._next_port = FIRST_PORT + int.from_bytes(os.urandom(3), "little")

    # Host programs.

    def has_room(self, others: int = 0) -> bool:
        return self._count + others < self.limits.connections

    def connect(self, sock: socket.socket, port: int, *, greet: bool) -> None:
        """Connect a host program's socket, ours from here, to a port of the guest; waits if its driver is not up."""
        if self._broken:
            sock.close()
            return
        connection = self._new(sock, port, from_guest=False, greet=greet)
        if self.running:
            self._request(connection)
        else:
            self._waiting[connection] = None

    def _request(self, connection: Connection) -> None:
        while True:
            port = self._next_port
            self._next_port = port + 1 if port < LAST_PORT else FIRST_PORT
            if (port, connection.guest_port) not in self._table:
                break
        self._table[port, connection.guest_port] = connection
        connection.request(port)

    def _new(self, sock: socket.socket, port: int, *, from_guest: bool, greet: bool = False) -> Connection:
        connection = Connection(self, sock, port, from_guest=from_guest, greet=greet)
        self._count += 1
        self._count_from_guest += from_guest
        return connection

    # Connections.

    def line_up(self, connection: Connection) -> None:
        """Give a connection a turn at the receive buffers."""
        if not connection.queued:
            connection.queued = True
            self._line.append(connection)

    def emptied(self, connection: Connection) -> None:
        """Have a connection's socket watched again when the guest knows what has come from it."""
        self._emptied.append(connection)

    def reset(self, connection: Connection) -> None:
        """End a connection, by RST if the guest knows of it."""
        if connection.state == WAITING:
            self._waiting.pop(connection, None)
            connection.close()
            return
        key = (connection.host_port, connection.guest_port)
        if self._table.get(key) is connection:
            del self._table[key]
            self._refuse(*key)
            connection.detach()
        else:
            connection.close()

    def closed(self, connection: Connection, granted: int) -> None:
        """A connection let go of its socket and window."""
        self.pool.give_back(granted)
        self._count -= 1
        self._count_from_guest -= connection.from_guest

    def forget_all(self) -> None:
        """The guest started anew: it knows of no connection."""
        connections = list(self._table.values())
        self._table.clear()
        self._refusals.clear()
        for connection in self._line:
            connection.queued = False
        self._line.clear()
        for connection in connections:
            connection.detach()

    def _refuse(self, host_port: int, guest_port: int, kind: int = packet.STREAM) -> None:
        header = HEADER.pack(HOST_CID, self.cid, host_port, guest_port, 0, kind, packet.RST, 0, 0, 0)
        self._refusals.append(header)

    # The rings.

    def start(self, ring: Ring, memory: Memory, *, event_idx: bool, indirect: bool) -> None:
        """Run a ring; the device runs when both do."""
        self._broken = False
        try:
            ring.start(memory, event_idx=event_idx, indirect=indirect)
        except RingError as error:
            self._break(ring, error)
            return
        if not self.running and self.rx.running and self.tx.running:
            self.running = True
            self._packets_wait = True
            waiting, self._waiting = self._waiting, {}
            for connection in waiting:
                self._request(connection)

    def stop(self, ring: Ring) -> int:
        """Stop a ring; connections stay, as it may go on.  Returns its position."""
        self.running = False
        if ring is self.rx and ring.running:
            self._receiver.rewind()
        return ring.stop()

    def remap(self, memory: Memory) -> None:
        """The memory table changed while the rings run."""
        for ring in (self.rx, self.tx):
            if ring.running:
                if ring is self.rx:
                    self._receiver.rewind()
                try:
                    ring.map(memory)
                except RingError as error:
                    self._break(ring, error)

    def kicked(self, ring: Ring) -> None:
        """The guest added something to a ring; the next turn looks."""
        if ring is self.tx:
            self._packets_wait = True
        elif ring.running:
            ring.refuse_kicks()  # until the next time that buffers are missing

    def turn(self) -> bool:
        """Move packets in both directions for a while; True if there is more to do at once."""
        if not self.running:
            return False
        ring = self.tx
        try:
            self.moved = 0
            if self._packets_wait or self.tx.stirs():
                self._take()
            ring = self.rx
            returning = self._may_return()
            if returning:  # seen with what it is interrupted for below, it mostly needs no interrupt of its own
                self.tx.show()
            more = self._give()
            if returning:
                self.tx.signal()
            if not more:
                self._receiver.prepare()
        except RingError as error:
            self._break(ring, error)
            return False
        return more or (self._packets_wait and len(self._refusals) < self.limits.refusals)

    def talks(self) -> bool:
        """Whether the last turn was about messages, not bulk."""
        return self.moved <= self.limits.small

    def stirs(self) -> bool:
        """Whether the guest has sent something without telling."""
        return self.running and not self._packets_wait and self.tx.stirs()

    def rest(self) -> bool:
        """Have the guest tell of what it sends from now on; True if something is there already."""
        if not self.running or self._packets_wait or not self._untold:
            return False
        self._untold = False
        try:
            self._packets_wait = self.tx.ask_kick()
        except RingError as error:
            self._break(self.tx, error)
        return self._packets_wait

    def _break(self, ring: Ring, error: Exception) -> None:
        self.log(f"the guest broke its {ring.name} ring, the device is off until the guest restarts it: {error}")
        for each in (self.rx, self.tx):
            self.stop(each)
        ring.fail()
        self._broken = True
        self.forget_all()
        waiting, self._waiting = self._waiting, {}
        for connection in waiting:
            connection.close()

    def _take(self) -> None:
        """Packets from the guest.  While refusals pile up, for want of receive buffers, no more are taken."""
        tx = self.tx
        tx.refuse_kicks()
        self._packets_wait = self._untold = True
        for _ in range(self.limits.turn):
            if len(self._refusals) >= self.limits.refusals:
                break
            chain = tx.take()
            if chain is None:
                self._packets_wait = False
                break
            try:
                self._packet(chain[1])
            except Exception as error:
                self.log(f"a packet could not be handled: {describe(error)}")
            tx.push(chain[0], 0)

    def _may_return(self) -> bool:
        """Whether it is time to tell the guest which packets were taken: not one by one; the rest in a while."""
        kept = self.tx.kept()
        if kept >= min(self.limits.kept, self.tx.size // 4) or self._kept_bytes > self.limits.kept_bytes:
            self._kept_bytes = 0
            return True
        if kept and not self._returning:
            self._returning = True
            self.loop.after(self.limits.keep, self._return_rest)
        return False

    def _return_rest(self) -> None:
        self._returning = False
        self._kept_bytes = 0
        if self.tx.running:
            self.tx.publish()

    def _give(self) -> bool:
        """Packets to the guest: refusals first, then one turn for each connection in the line."""
        receiver = self._receiver
        for _ in range(self.limits.turn):
            if self._refusals:
                buffers = receiver.get(1)
                fed = bool(buffers)
                if fed:
                    receiver.send(buffers[0], self._refusals.popleft())
            elif self._line:
                fed = self._serve(receiver)
            else:
                return False
            self.rx.publish()
            while self._emptied:  # only now: the guest has something to do meanwhile
                self._emptied.pop().watch()
            if not fed and receiver.starved():
                return False  # until a kick
        return bool(self._refusals or self._line)

    def _serve(self, receiver: Receiver) -> bool:
        connection = self._line.popleft()
        connection.queued = False
        try:
            fed = connection.emit(receiver)
        except RingError:
            raise
        except Exception as error:
            self.log(f"connection to the guest's port {connection.guest_port}: {describe(error)}")
            self.reset(connection)
            return True
        if not fed and not connection.queued:
            connection.queued = True
            self._line.appendleft(connection)
        return fed

    # The guest's packets.

    def _packet(self, pieces: list[memoryview]) -> None:
        if not pieces or len(pieces[0]) < packet.SIZE:
            # A header in pieces: put it together.
            whole = b"".join(cut(pieces, packet.SIZE))
            if len(whole) < packet.SIZE:
                self.log("the guest sent a packet shorter than its header")
                return
            pieces = [memoryview(whole), *behind(pieces, packet.SIZE)]
        # Taken out of shared memory once.
        header = HEADER.unpack_from(pieces[0])
        source, target, guest_port, host_port, length, kind, op, flags, window, forwarded = header
        if source != self.cid or target != HOST_CID:
            self.log(f"the guest sent a packet from CID {source} to CID {target}")
            return
        if kind != packet.STREAM:
            if op != packet.RST:
                self._refuse(host_port, guest_port, kind)
            return
        connection = self._table.get((host_port, guest_port))
        if connection is None:
            if op == packet.REQUEST:
                self._accept(host_port, guest_port, window, forwarded)
            elif op != packet.RST:
                self._refuse(host_port, guest_port)
            return
        if op == packet.RST:
            del self._table[host_port, guest_port]
            connection.detach()
            return
        try:
            connection.credit(window, forwarded)
            payload: list[memoryview] = []
            if op == packet.RW and length:
                payload = behind(pieces, packet.SIZE)
                if len(payload) != 1 or len(payload[0]) != length:
                    if length > sum(map(len, payload)):
                        raise Violation(f"{length} bytes announced, {sum(map(len, payload))} sent")
                    payload = cut(payload, length)
                self._kept_bytes += length
                self.moved += length
            connection.handle(op, flags, payload, length)
        except Violation as error:
            self.log(f"the guest broke a connection, its port {guest_port} to port {host_port}: {error}")
            self.reset(connection)
        except Exception:
            self.reset(connection)
            raise

    def _accept(self, host_port: int, guest_port: int, window: int, forwarded: int) -> None:
        if self._count_from_guest >= self.limits.from_guest or not self.has_room():
            self.log(f"the guest has too many connections: one to port {host_port} refused")
            self._refuse(host_port, guest_port)
            return
        try:
            sock = self._dial(host_port)
        except OSError:
            self._refuse(host_port, guest_port)
            return
        connection = self._new(sock, guest_port, from_guest=True)
        self._table[host_port, guest_port] = connection
        connection.credit(window, forwarded)
        connection.accept(host_port)


#: Each kick is an edge: nothing needs to be read from the descriptor.
KICK = select.EPOLLIN | select.EPOLLET

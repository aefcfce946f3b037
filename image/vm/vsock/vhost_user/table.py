"""The connections of a device by their ports, from the request to the last byte, within the limits."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from .connection import WAITING, VsockConnection
from .limits import BufferPool, DeviceLimits
from .log import RateLimitedLog
from .loop import Loop
from .rx import RxQueue

#: Host ports for connections that the host opens.
FIRST_PORT = 1 << 30
LAST_PORT = (1 << 31) - 1


class ConnectionTable:
    """The connections of one device.

    ``dial`` opens a socket to the host program for the port in a guest's REQUEST, or raises OSError.
    """

    def __init__(
        self,
        cid: int,
        rx: RxQueue,
        loop: Loop,
        log: RateLimitedLog,
        limits: DeviceLimits,
        dial: Callable[[int], socket.socket],
    ) -> None:
        self.cid = cid
        self.rx = rx
        self.loop = loop
        self.log = log
        self.limits = limits
        self.pool = BufferPool(limits)
        self.running = False  # both virtqueues run
        self._dial = dial
        self._by_ports: dict[tuple[int, int], VsockConnection] = {}  # by the host's and the guest's port
        self._waiting: dict[VsockConnection, None] = {}  # for the driver, in order of arrival
        self._count = 0
        self._count_from_guest = 0
        # Not from an earlier device's start: the guest may remember its connections.
        self._next_port = FIRST_PORT + int.from_bytes(os.urandom(3), "little")

    def has_room(self, others: int = 0) -> bool:
        """Return whether another host socket may be held, beside those of the table and ``others``."""
        return self._count + others < self.limits.connections

    def find(self, host_port: int, guest_port: int) -> VsockConnection | None:
        """Return the connection of a pair of ports."""
        return self._by_ports.get((host_port, guest_port))

    def connect(self, sock: socket.socket, port: int, *, greet: bool) -> None:
        """Connect a host program's socket, ours from here, to a port of the guest; waits for the guest's driver."""
        connection = self._add(sock, port, from_guest=False, greet=greet)
        if self.running:
            self._request(connection)
        else:
            self._waiting[connection] = None

    def accept(self, host_port: int, guest_port: int, buf_alloc: int, fwd_cnt: int) -> None:
        """Answer a REQUEST of the guest's: RESPONSE, or RST if nothing listens or there are too many."""
        if self._count_from_guest >= self.limits.from_guest or not self.has_room():
            self.log(f"the guest has too many connections: one to port {host_port} refused")
            self.rx.queue_rst(host_port, guest_port)
            return
        try:
            sock = self._dial(host_port)
        except OSError:
            self.rx.queue_rst(host_port, guest_port)
            return
        connection = self._add(sock, guest_port, from_guest=True)
        self._by_ports[host_port, guest_port] = connection
        connection.update_credit(buf_alloc, fwd_cnt)
        connection.accept(host_port)

    def resume(self) -> None:
        """Connect those that waited for both virtqueues to run."""
        self.running = True
        waiting, self._waiting = self._waiting, {}
        for connection in waiting:
            self._request(connection)

    def reset(self, connection: VsockConnection) -> None:
        """End a connection, by RST if the guest knows of it."""
        if connection.state == WAITING:
            self._waiting.pop(connection, None)
            connection.close()
            return
        ports = (connection.host_port, connection.guest_port)
        if self._by_ports.get(ports) is connection:
            del self._by_ports[ports]
            self.rx.queue_rst(*ports)
            connection.detach()
        else:
            connection.close()

    def remove(self, connection: VsockConnection) -> None:
        """End a connection that the guest has reset."""
        del self._by_ports[connection.host_port, connection.guest_port]
        connection.detach()

    def drop_all(self) -> None:
        """End all connections that the guest knew of: it has restarted."""
        connections = list(self._by_ports.values())
        self._by_ports.clear()
        self.rx.clear()
        for connection in connections:
            connection.detach()

    def close_waiting(self) -> None:
        """Close the sockets waiting for the guest's driver: it is broken."""
        waiting, self._waiting = self._waiting, {}
        for connection in waiting:
            connection.close()

    def closed(self, connection: VsockConnection, granted: int) -> None:
        """Remove a connection that has closed its socket, returning ``granted`` bytes of buf_alloc."""
        self.pool.free(granted)
        self._count -= 1
        self._count_from_guest -= connection.from_guest

    def _request(self, connection: VsockConnection) -> None:
        while True:
            port = self._next_port
            self._next_port = port + 1 if port < LAST_PORT else FIRST_PORT
            if (port, connection.guest_port) not in self._by_ports:
                break
        self._by_ports[port, connection.guest_port] = connection
        connection.request(port)

    def _add(self, sock: socket.socket, port: int, *, from_guest: bool, greet: bool = False) -> VsockConnection:
        connection = VsockConnection(self, sock, port, from_guest=from_guest, greet=greet)
        self._count += 1
        self._count_from_guest += from_guest
        return connection

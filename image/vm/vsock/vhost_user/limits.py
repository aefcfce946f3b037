"""The limits of one device: what a guest or a host program may use, and for how long.  Bytes and seconds."""

from __future__ import annotations


class DeviceLimits:
    """Worst case of buffered data: ``connections * buf_alloc + pool`` = 32 MiB."""

    def __init__(self) -> None:
        #: Host sockets of all kinds; later ones wait in the listener's backlog.
        self.connections = 4096
        #: Those opened by the guest: it cannot lock the host out.
        self.from_guest = 2048
        #: buf_alloc of a new connection: what the guest may have in flight to the host.
        self.buf_alloc = 4096
        #: buf_alloc of a busy one.  The Linux driver sends no more than this anyway (its own receive buffer).
        self.max_buf_alloc = 256 << 10
        #: The pool, shared by all connections, from which buf_alloc grows.
        self.pool = 16 << 20
        #: RST packets that may wait for rx buffers before tx processing stops.
        self.pending_rsts = 256
        #: Packets processed before other descriptors get a turn.
        self.batch = 64
        #: Used tx chains before they are published, bytes of data in them, and how long they may wait: publishing
        #: interrupts the guest, which delays its next packet.  Linux wakes a sender that has got credit again only
        #: while we hold less than half of its send buffer (208 KiB).
        self.unpublished = 16
        self.unpublished_bytes = 32 << 10
        self.publish_delay = 0.002
        #: Busy polling before the process sleeps, while events come that fast (an emulated guest answers within it),
        #: and the bytes of a turn above which there is none: the guest needs the processor then.
        self.busy_poll = 0.0004
        self.busy_poll_bytes = 4096
        #: Bytes of a host program's CONNECT line, and the time for it.
        self.connect_line = 32
        self.connect_timeout = 5.0
        #: Timeout of the guest's answer to a REQUEST.
        self.response_timeout = 30.0
        #: Timeout of the guest's RST after both sides have shut down (the same as in Linux).
        self.close_timeout = 8.0
        #: Timeout of the last data of a closed host program, if the guest reads none of it.
        self.linger_timeout = 600.0
        #: Delay before a listener that ran out of descriptors or connections accepts again.
        self.accept_pause = 0.1
        #: Lines that may be logged at once; then one a second.
        self.log_burst = 20


class BufferPool:
    """The pool for buf_alloc to grow from: each connection gets less the more is taken, so that later ones get some
    too.
    """

    def __init__(self, limits: DeviceLimits) -> None:
        self._free = limits.pool
        self._most = limits.max_buf_alloc - limits.buf_alloc

    def allocate(self) -> int:
        """Allocate bytes from the pool; returns how many, possibly 0."""
        granted = min(self._most, self._free // 64)
        self._free -= granted
        return granted

    def free(self, granted: int) -> None:
        """Return bytes to the pool."""
        self._free += granted

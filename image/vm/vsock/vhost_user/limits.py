"""The bounds of one device: what a guest or a host program may use up, and for how long.  Bytes and seconds."""

from __future__ import annotations


class DeviceLimits:
    """Worst case of buffered data: ``connections * buf_alloc + pool`` = 32 MiB."""

    def __init__(self) -> None:
        #: Host sockets of all kinds; what comes later waits in the listener's backlog.
        self.connections = 4096
        #: Of these, the ones that the guest opened: it cannot lock the host out.
        self.from_guest = 2048
        #: buf_alloc of a new connection: what the guest may have in flight to the host.
        self.buf_alloc = 4096
        #: buf_alloc of a busy one.  The Linux driver sends no more than this anyway (its own receive buffer).
        self.max_buf_alloc = 256 << 10
        #: Out of this, shared by all connections, buf_alloc grows.
        self.pool = 16 << 20
        #: RST packets that wait for rx buffers, before no more tx packets are processed.
        self.pending_rsts = 256
        #: Packets processed before other descriptors have their turn.
        self.batch = 64
        #: Used tx chains before they are published, bytes of data in them, and how long they may wait: to publish is to
        #: interrupt, and what the guest has to say next would wait for that.  Linux wakes a sender that has credit
        #: again only while less than half its send buffer (208 KiB) is with us.
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
        #: For the guest's answer to a REQUEST.
        self.response_timeout = 30.0
        #: For the guest's RST after both sides have shut down (Linux waits as long).
        self.close_timeout = 8.0
        #: For the last data of a closed host program, with a guest that reads none of it.
        self.linger_timeout = 600.0
        #: Before a listener that ran out of descriptors or connections accepts again.
        self.accept_pause = 0.1
        #: Lines that may be logged at once; then one a second.
        self.log_burst = 20


class BufferPool:
    """What buf_alloc may grow by: less for each connection the more is taken, so that latecomers get something too."""

    def __init__(self, limits: DeviceLimits) -> None:
        self._free = limits.pool
        self._most = limits.max_buf_alloc - limits.buf_alloc

    def allocate(self) -> int:
        """Take bytes out of the pool; returns how many, which may be none."""
        granted = min(self._most, self._free // 64)
        self._free -= granted
        return granted

    def free(self, granted: int) -> None:
        """Give bytes back."""
        self._free += granted

"""What a guest or a host program may use up, and how long it may take.  Sizes in bytes, times in seconds."""

from __future__ import annotations


class Limits:
    """The bounds of one device.  Worst case of buffered data: ``connections * window + pool`` = 32 MiB."""

    def __init__(self) -> None:
        #: Host sockets of all kinds; what comes later waits in the listener's backlog.
        self.connections = 4096
        #: Of these, the ones that the guest opened: it cannot lock the host out.
        self.from_guest = 2048
        #: What a new connection may have in flight to the host.
        self.window = 4096
        #: What a busy one may have.  The Linux driver sends no more than this anyway (its own receive buffer).
        self.full_window = 256 << 10
        #: Out of this, shared by all connections, windows grow.
        self.pool = 16 << 20
        #: Refusals waiting for receive buffers, before no more packets are taken from the guest.
        self.refusals = 256
        #: Packets handled before other descriptors have their turn.
        self.turn = 64
        #: Packets taken from the guest before it is told that it may have their memory back, bytes of data in them, and
        #: how long it may wait: to tell is to interrupt, and what the guest has to say next would wait for that.  Linux
        #: wakes a sender that has credit again only while less than half its send buffer (208 KiB) is with us.
        self.kept = 16
        self.kept_bytes = 32 << 10
        self.keep = 0.002
        #: Looking for what comes next before sleeping, while it comes that fast (an emulated guest answers within it),
        #: and the bytes of a turn above which there is no looking: the guest needs the processor then.
        self.patience = 0.0004
        self.small = 4096
        #: A host program's CONNECT line.
        self.line = 32
        self.handshake = 5.0
        #: The guest's answer to a request.
        self.answer = 30.0
        #: The guest's RST after both sides said that they have nothing more (Linux waits as long).
        self.close = 8.0
        #: A closed host program's last data, with a guest that does not read any of it.
        self.linger = 600.0
        #: Before a listener that ran out of descriptors or connections looks again.
        self.pause = 0.1
        #: JSONSocket that may be complained at once; then one a second.
        self.complaints = 20


class Pool:
    """Hands out what windows may grow by: less to each the more is taken, so that latecomers get something too."""

    def __init__(self, limits: Limits) -> None:
        self._free = limits.pool
        self._most = limits.full_window - limits.window

    def grant(self) -> int:
        granted = min(self._most, self._free // 64)
        self._free -= granted
        return granted

    def give_back(self, granted: int) -> None:
        self._free += granted

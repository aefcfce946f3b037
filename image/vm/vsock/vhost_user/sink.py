"""From the guest into a host program's socket: what it does not take yet is kept, never more than the window."""

from __future__ import annotations

import os

from .packet import COUNT

MAX_PIECES = 1000  # writev(2) takes 1024


class Sink:
    """Writes to ``fd`` without blocking.  ``window``: what the guest may have in flight (our buf_alloc); only grows."""

    __slots__ = ("discarding", "fd", "pending", "reported", "taken", "window")

    def __init__(self, fd: int, window: int) -> None:
        self.fd = fd
        self.window = window
        self.pending = bytearray()
        self.discarding = False  # the host program receives no more
        self.taken = 0  # bytes that the host program took: our fwd_cnt
        self.reported = 0  # what the guest was told of that

    def credit(self) -> int:
        """How many bytes the guest may send, if it has heard of all that was taken."""
        return self.window - len(self.pending)

    def write(self, pieces: list[memoryview], length: int) -> bool:
        """Take ``length`` bytes, the sum of ``pieces``; False when the host program turns out to receive no more."""
        pending = self.pending
        if self.discarding:
            self.taken = (self.taken + length) & COUNT
        elif pending:
            for piece in pieces:
                pending += piece
        else:
            try:
                done = os.write(self.fd, pieces[0]) if len(pieces) == 1 else os.writev(self.fd, pieces[:MAX_PIECES])
            except BlockingIOError:
                done = 0
            except OSError:  # it closed, or said that it will not receive
                self.taken = (self.taken + length) & COUNT
                return False
            self.taken = (self.taken + done) & COUNT
            if done < length:
                for piece in pieces:
                    pending += piece[done:]
                    done = max(0, done - len(piece))
        return True

    def flush(self) -> bool:
        """Write what is pending, as far as it goes; False as for ``write``."""
        try:
            done = os.write(self.fd, self.pending)
        except BlockingIOError:
            return True
        except OSError:
            return False
        del self.pending[:done]
        self.taken = (self.taken + done) & COUNT
        return True

    def discard(self) -> None:
        """Throw away what is pending, and all that comes."""
        self.discarding = True
        self.taken = (self.taken + len(self.pending)) & COUNT
        self.pending.clear()

    def report_due(self, peer_window: int) -> bool:
        """Whether the guest should hear of what was taken, lest it run out of credit.

        A quarter of the smaller window: Linux has no more in flight than its own receive buffer holds, whatever we
        announce.  And a sender that ran out is not woken before most of what it sent was given back, so it had better
        not: reported by halves, bulk came 0.8 times as fast.
        """
        unreported = (self.taken - self.reported) & COUNT
        return bool(unreported) and 4 * unreported >= min(self.window, peer_window)

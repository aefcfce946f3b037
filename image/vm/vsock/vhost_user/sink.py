"""From the guest into a host program's socket: what it does not take yet is kept, never more than buf_alloc."""

from __future__ import annotations

import os

from .packet import COUNTER_MASK

MAX_PIECES = 1000  # writev(2) takes 1024


class Sink:
    """Writes to ``fd`` without blocking.  ``buf_alloc``: what the guest may have in flight; only grows."""

    __slots__ = ("buf_alloc", "discarding", "fd", "fwd_cnt", "pending", "reported_fwd_cnt")

    def __init__(self, fd: int, buf_alloc: int) -> None:
        self.fd = fd
        self.buf_alloc = buf_alloc
        self.pending = bytearray()
        self.discarding = False  # the host program receives no more
        self.fwd_cnt = 0  # bytes that the host program took
        self.reported_fwd_cnt = 0  # what the guest was told of that

    def credit(self) -> int:
        """Return how many bytes the guest may send, if it has heard of all that was taken."""
        return self.buf_alloc - len(self.pending)

    def write(self, pieces: list[memoryview], length: int) -> bool:
        """Take ``length`` bytes, the sum of ``pieces``; False when the host program turns out to receive no more."""
        pending = self.pending
        if self.discarding:
            self.fwd_cnt = (self.fwd_cnt + length) & COUNTER_MASK
        elif pending:
            for piece in pieces:
                pending += piece
        else:
            try:
                done = os.write(self.fd, pieces[0]) if len(pieces) == 1 else os.writev(self.fd, pieces[:MAX_PIECES])
            except BlockingIOError:
                done = 0
            except OSError:  # it closed, or said that it will not receive
                self.fwd_cnt = (self.fwd_cnt + length) & COUNTER_MASK
                return False
            self.fwd_cnt = (self.fwd_cnt + done) & COUNTER_MASK
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
        self.fwd_cnt = (self.fwd_cnt + done) & COUNTER_MASK
        return True

    def discard(self) -> None:
        """Throw away what is pending, and all that comes."""
        self.discarding = True
        self.fwd_cnt = (self.fwd_cnt + len(self.pending)) & COUNTER_MASK
        self.pending.clear()

    def update_due(self, peer_buf_alloc: int) -> bool:
        """Tell whether a CREDIT_UPDATE is due, lest the guest run out of credit.

        A quarter of the smaller buf_alloc: Linux has no more in flight than its own receive buffer holds, whatever we
        announce.  And a sender that ran out is not woken before most of what it sent was given back, so it had better
        not: reported by halves, bulk came 0.8 times as fast.
        """
        unreported = (self.fwd_cnt - self.reported_fwd_cnt) & COUNTER_MASK
        return bool(unreported) and 4 * unreported >= min(self.buf_alloc, peer_buf_alloc)

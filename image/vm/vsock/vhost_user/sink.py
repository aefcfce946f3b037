"""From the guest into a host program's socket: data that it does not accept yet is kept, at most buf_alloc."""

from __future__ import annotations

import os

from .packet import COUNTER_MASK

MAX_PIECES = 1000  # writev(2) takes 1024


class Sink:
    """Write to ``fd`` without blocking.  ``buf_alloc``: bytes that the guest may have in flight; only grows."""

    __slots__ = ("buf_alloc", "discarding", "fd", "fwd_cnt", "pending", "reported_fwd_cnt")

    def __init__(self, fd: int, buf_alloc: int) -> None:
        self.fd = fd
        self.buf_alloc = buf_alloc
        self.pending = bytearray()
        self.discarding = False  # the host program receives no more
        self.fwd_cnt = 0  # bytes that the host program has accepted
        self.reported_fwd_cnt = 0  # the value last sent to the guest

    def credit(self) -> int:
        """Return how many bytes the guest may send, given the latest fwd_cnt."""
        return self.buf_alloc - len(self.pending)

    def write(self, pieces: list[memoryview], length: int) -> bool:
        """Take ``length`` bytes, the sum of ``pieces``; False if the host program turns out to receive no more."""
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
            except OSError:  # it has closed, or shut down receiving
                self.fwd_cnt = (self.fwd_cnt + length) & COUNTER_MASK
                return False
            self.fwd_cnt = (self.fwd_cnt + done) & COUNTER_MASK
            if done < length:
                for piece in pieces:
                    pending += piece[done:]
                    done = max(0, done - len(piece))
        return True

    def flush(self) -> bool:
        """Write pending data, as far as possible; False as for ``write``."""
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
        """Discard pending and future data."""
        self.discarding = True
        self.fwd_cnt = (self.fwd_cnt + len(self.pending)) & COUNTER_MASK
        self.pending.clear()

    def update_due(self, peer_buf_alloc: int) -> bool:
        """Return whether a CREDIT_UPDATE is due, so that the guest does not run out of credit.

        A quarter of the smaller buf_alloc: Linux has at most its own receive buffer in flight, whatever we announce.
        And a sender that ran out is only woken once most of its credit is returned, so avoid that: with updates by
        halves, bulk was 0.8 times as fast.
        """
        unreported = (self.fwd_cnt - self.reported_fwd_cnt) & COUNTER_MASK
        return bool(unreported) and 4 * unreported >= min(self.buf_alloc, peer_buf_alloc)

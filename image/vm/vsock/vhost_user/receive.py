"""The guest's receive buffers: taken from the ring ahead of use, filled in order, put back when the ring stops."""

from __future__ import annotations

from collections import deque

from .packet import SIZE
from .ring import Ring, RingError

#: Pieces of one buffer that are used; readv(2) takes 1024, and 16 buffers are filled at once.
MAX_PIECES = 60


class Buffer:
    """Room for one packet: pieces for the header, pieces for the payload."""

    __slots__ = ("head", "header", "payload", "room")

    def __init__(self, head: int, pieces: list[memoryview]) -> None:
        self.head = head
        self.header: list[memoryview] = []
        missing = SIZE
        for number, piece in enumerate(pieces):
            if len(piece) > missing:
                self.header.append(piece[:missing])
                self.payload = [piece[missing:], *pieces[number + 1 : number + MAX_PIECES]]
                break
            self.header.append(piece)
            missing -= len(piece)
            if not missing:
                self.payload = pieces[number + 1 : number + 1 + MAX_PIECES]
                break
        else:
            raise RingError("rx: a buffer with no room for a header")
        self.room = sum(map(len, self.payload))
        if not self.room:
            raise RingError("rx: a buffer with no room for data")

    def write_header(self, header: bytes) -> None:
        if len(self.header) == 1:
            self.header[0][:] = header
            return
        at = 0
        for piece in self.header:
            piece[:] = header[at : at + len(piece)]
            at += len(piece)


class Receiver:
    """Buffers of the rx ring in the order in which the guest gave them."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self._spare: deque[Buffer] = deque()

    def get(self, count: int) -> list[Buffer]:
        """Up to ``count`` buffers, to be used from the first on, the rest goes to ``unget``.  Raises RingError."""
        spare, take = self._spare, self.ring.take
        while len(spare) < count:
            chain = take()
            if chain is None:
                break
            spare.append(Buffer(*chain))
        return [spare.popleft() for _ in range(min(count, len(spare)))]

    def prepare(self) -> None:
        """Have a buffer ready, so that less is to be done when there is something to put into it.  Raises RingError."""
        if not self._spare:
            chain = self.ring.take()
            if chain is not None:
                self._spare.append(Buffer(*chain))

    def unget(self, buffers: list[Buffer]) -> None:
        self._spare.extendleft(reversed(buffers))

    def send(self, buffer: Buffer, header: bytes, payload: int = 0) -> None:
        """Give a buffer to the guest, with ``payload`` bytes already in it."""
        buffer.write_header(header)
        self.ring.push(buffer.head, SIZE + payload)

    def starved(self) -> bool:
        """Ask for a kick; False if there are buffers after all."""
        return not self._spare and not self.ring.ask_kick()

    def rewind(self) -> None:
        """Forget the buffers that were taken ahead, as if they were still in the ring."""
        self.ring.give_back(len(self._spare))
        self._spare.clear()

"""The header of a vsock packet and its constants (virtio 1.2, section 5.10.6), and packets in pieces of memory."""

from __future__ import annotations

import struct

#: src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt; little-endian, no padding.
HEADER = struct.Struct("<QQIIIHHIII")
SIZE = HEADER.size

HOST_CID = 2
STREAM = 1

REQUEST = 1
RESPONSE = 2
RST = 3
SHUTDOWN = 4
RW = 5
CREDIT_UPDATE = 6
CREDIT_REQUEST = 7

#: Flags of SHUTDOWN: the sender of the packet will not receive, or send, any more (5.10.6.5).
SHUTDOWN_RCV = 1
SHUTDOWN_SEND = 2
SHUTDOWN_BOTH = SHUTDOWN_RCV | SHUTDOWN_SEND

#: Counters (fwd_cnt, and what is compared with it) wrap at 32 bits.
COUNTER_MASK = 0xFFFFFFFF


def first_bytes(pieces: list[memoryview], size: int) -> list[memoryview]:
    """Return the first ``size`` bytes of ``pieces``."""
    kept = []
    for piece in pieces:
        if size <= 0:
            break
        kept.append(piece[:size])
        size -= len(piece)
    return kept


def bytes_after(pieces: list[memoryview], size: int) -> list[memoryview]:
    """Return ``pieces`` after the first ``size`` bytes."""
    for number, piece in enumerate(pieces):
        if len(piece) > size:
            return [piece[size:], *pieces[number + 1 :]]
        size -= len(piece)
        if not size:
            return pieces[number + 1 :]
    return []

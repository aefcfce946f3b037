"""rtnetlink(7): requests to the kernel about links, addresses, routes and neighbours, and its replies.

pyroute2 would be the library for it, but needs ssl, unittest and multiprocessing, which a guest does not have, and a
hundred modules of its own for four kinds of messages.
"""

from __future__ import annotations

import os
import socket
from struct import Struct

from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Self

# Message types: operation and object.  include/uapi/linux/rtnetlink.h
NEWLINK, GETLINK, NEWADDR, DELADDR, GETADDR, NEWROUTE, DELROUTE, GETROUTE, NEWNEIGH = 16, 18, 20, 21, 22, 24, 25, 26, 28
# Flags.  include/uapi/linux/netlink.h
REQUEST, ACK, REPLACE, EXCL, DUMP, CREATE = 0x1, 0x4, 0x100, 0x200, 0x300, 0x400
# Attributes, each within its kind.
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_NET_NS_PID = 1, 3, 4, 19
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_FLAGS = 1, 2, 4, 8
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC, RTA_METRICS, RTA_CACHEINFO, RTA_TABLE = 1, 4, 5, 7, 8, 12, 15
RTAX_MTU = 2  # within RTA_METRICS
NDA_DST, NDA_LLADDR = 1, 2

#: The fixed part that each kind begins with: ifinfomsg, ifaddrmsg, rtmsg, ndmsg.
LINK, ADDRESS, ROUTE, NEIGHBOUR = Struct("=BxHiII"), Struct("=BBBBI"), Struct("=8BI"), Struct("=B3xiHBB")
_FIXED = {NEWLINK: LINK, NEWADDR: ADDRESS, NEWROUTE: ROUTE}

_HEADER, _ATTRIBUTE, _ERROR = Struct("=IHHII"), Struct("=HH"), Struct("=i")
_ERROR_TYPE, _DONE_TYPE = 2, 3
_TYPE_MASK = 0x3FFF  # without the flags "nested" and "network byte order"
_BUFFER = 1 << 16  # the kernel's largest part of a dump is 32 KiB
_KERNEL = 0  # its port (netlink(7)); whoever has CAP_NET_ADMIN in this network namespace can send to ours, too
_CUT_OFF = "a truncated reply from the kernel's rtnetlink"
_MAX_ERRNO = 4095  # include/linux/err.h


class Message(Record):
    """A reply: its fixed part as numbers, and its attributes as bytes."""

    fixed: tuple[int, ...]
    attributes: Mapping[int, bytes]

    def number(self, attribute: int) -> int:
        """Read a numeric attribute; 0 if it is missing."""
        return int.from_bytes(self.attributes.get(attribute, b""), "little")

    def text(self, attribute: int) -> str:
        """Read a string attribute; empty if it is missing."""
        return self.attributes.get(attribute, b"").rstrip(b"\0").decode(errors="replace")


class Rtnetlink:
    """A connection to the kernel, which replies within the call: nothing here waits for anything else."""

    def __enter__(self) -> Self:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._sequence = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def change(self, kind: int, fixed: bytes, attributes: Mapping[int, bytes], flags: int = 0) -> None:
        """Request a change.  Raises OSError with the kernel's reason."""
        self._send(kind, REQUEST | ACK | flags, fixed + encode_attributes(attributes))
        for _ in self._answers():
            pass

    def dump(self, kind: int, family: int = 0) -> list[Message]:
        """Dump all objects of a kind (one of GET…), of one address family or of all.  Raises OSError."""
        fixed = _FIXED[kind - 2]  # GETLINK is NEWLINK + 2, and so on
        self._send(kind, REQUEST | DUMP, bytes([family]).ljust(fixed.size, b"\0"))
        return [_decode(fixed, body) for _, body in self._answers()]

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0) + body)

    def _answers(self) -> Iterator[tuple[int, bytes]]:
        """Yield the parts of a reply, up to its end.  Raises OSError if that is an error."""
        while True:
            data, sender = self._socket.recvfrom(_BUFFER)
            if sender[0] != _KERNEL:
                continue
            while len(data) >= _HEADER.size:
                length, kind, _, sequence, _ = _HEADER.unpack_from(data)
                if not _HEADER.size <= length <= len(data):
                    raise OSError(0, _CUT_OFF)
                body, data = data[_HEADER.size : length], data[_aligned(length) :]
                if sequence != self._sequence:
                    continue
                if kind in (_ERROR_TYPE, _DONE_TYPE):
                    if len(body) < _ERROR.size:
                        raise OSError(0, _CUT_OFF)
                    code = -_ERROR.unpack_from(body)[0]
                    if not 0 <= code <= _MAX_ERRNO:
                        raise OSError(0, _CUT_OFF)
                    if code:
                        raise OSError(code, os.strerror(code))
                    return
                yield kind, body


def _decode(fixed: Struct, body: bytes) -> Message:
    if len(body) < fixed.size:
        raise OSError(0, _CUT_OFF)
    return Message(fixed.unpack_from(body), dict(_attributes(body[fixed.size :])))


def number(value: int) -> bytes:
    """Encode a number as an attribute's value."""
    return value.to_bytes(4, "little")


def encode_attributes(attributes: Mapping[int, bytes]) -> bytes:
    """Encode attributes one after the other, each padded."""
    return b"".join(_attribute(*one) for one in attributes.items())


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return (_ATTRIBUTE.pack(length, kind) + value).ljust(_aligned(length), b"\0")


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            return
        yield kind & _TYPE_MASK, data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    return length + 3 & ~3

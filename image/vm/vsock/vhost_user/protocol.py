"""vhost-user messages on the control socket: framing, descriptors, replies (QEMU's docs/interop/vhost-user.rst)."""

from __future__ import annotations

import array
import os
import socket
import struct

GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
RESET_OWNER = 4
SET_MEM_TABLE = 5
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
SET_VRING_ERR = 14
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
SET_VRING_ENABLE = 18
GET_CONFIG = 24

F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_PROTOCOL_FEATURES = 1 << 30
F_VERSION_1 = 1 << 32
PROTOCOL_REPLY_ACK = 1 << 3
PROTOCOL_CONFIG = 1 << 9

HEADER = struct.Struct("<III")
VERSION = 1
REPLY = 0x4
NEED_REPLY = 0x8
#: The longest message QEMU can send us is a memory table; a descriptor for each of its regions.
MAX_PAYLOAD = 4096
MAX_FDS = 32


class VhostUserError(Exception):
    """The front end sent an invalid message; ``fatal`` if the stream is out of sync."""

    def __init__(self, text: str, *, fatal: bool = False) -> None:
        super().__init__(text)
        self.fatal = fatal


class VhostUserMessage:
    """A request.  Its handler takes descriptors out of ``fds``; ``close()`` closes the rest."""

    __slots__ = ("fds", "flags", "payload", "request")

    def __init__(self, request: int, flags: int, payload: bytes, fds: list[int]) -> None:
        self.request = request
        self.flags = flags
        self.payload = payload
        self.fds = fds

    def unpack(self, form: struct.Struct) -> tuple[int, ...]:
        """Unpack the payload.  Raises VhostUserError for a wrong length."""
        if len(self.payload) != form.size:
            raise VhostUserError(f"request {self.request} with {len(self.payload)} bytes instead of {form.size}")
        return form.unpack(self.payload)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


class Channel:
    """The control socket; never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._data = bytearray()
        self._fds: list[int] = []

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> VhostUserMessage | None:
        """Return the next message; None until more arrives.  Raises EOFError at the end, VhostUserError."""
        while True:
            wanted = HEADER.size
            if len(self._data) >= wanted:
                request, flags, size = HEADER.unpack_from(self._data)
                if size > MAX_PAYLOAD:
                    raise VhostUserError(f"request {request} announces {size} bytes", fatal=True)
                if flags & 3 != VERSION or flags & REPLY:
                    raise VhostUserError(f"request {request} has flags {flags:#x}", fatal=True)
                wanted += size
                if len(self._data) == wanted:
                    message = VhostUserMessage(request, flags, bytes(self._data[HEADER.size :]), self._fds)
                    self._data.clear()
                    self._fds = []
                    return message
            if not self._more(wanted - len(self._data)):
                return None

    def reply(self, message: VhostUserMessage, payload: bytes) -> None:
        """Send a reply.  Raises VhostUserError if the front end does not read it."""
        data = HEADER.pack(message.request, VERSION | REPLY, len(payload)) + payload
        try:
            sent = self._sock.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except (BrokenPipeError, ConnectionResetError):
            return  # it is closed; the next receive reports it
        if sent != len(data):
            raise VhostUserError("the front end does not read our replies", fatal=True)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
        self._sock.close()

    def _more(self, size: int) -> bool:
        try:
            space = socket.CMSG_SPACE(MAX_FDS * 4)
            data, ancillary, flags, _ = self._sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data, ancillary, flags = b"", [], 0
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            raise VhostUserError("too many descriptors with a message", fatal=True)
        if not data:
            raise EOFError
        self._data += data
        return True

"""The result of a ttrpc call: the encoded response of its method, or an error.  Needs neither asyncio nor protobuf.

The server may be hostile (a guest is): texts are truncated, and only a few details are kept.
"""

from __future__ import annotations

from caisson.agent.rpc import wire
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc import frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: Characters of a server's error text that are kept.
MAX_ERROR_TEXT = 4096

#: Details of an error that are kept.
MAX_DETAILS = 8

#: Stream ids are odd and never used again on a connection.
MAX_STREAM_ID = (1 << 32) - 1


class RpcError(Exception):
    """A call that failed: its status code, the server's text, and the types and values of its details."""

    def __init__(self, code: StatusCode, text: str, details: Sequence[tuple[str, bytes]] = ()) -> None:
        super().__init__(text or code.name)
        self.code = code
        self.text = text
        self.details = details


class ConnectionClosed(RpcError):
    """The connection closed before the response arrived; the call may or may not have been executed."""

    def __init__(self, text: str = "the connection is closed") -> None:
        super().__init__(StatusCode.UNAVAILABLE, text)


def payload_of(frame: frames.Frame) -> bytes:
    """Return a response's payload, or raise its RpcError."""
    return bytes(payload_view(frame))


def payload_view(frame: frames.Frame) -> memoryview:
    """Return a response's payload where it was received, or raise its RpcError."""
    if frame.data is None:
        raise RpcError(StatusCode.RESOURCE_EXHAUSTED, frames.too_long(frame.length))
    payload = status = memoryview(b"")
    try:
        for number, value in wire.decode(memoryview(frame.data)):
            if isinstance(value, memoryview):
                if number == 1:
                    status = value
                elif number == 2:
                    payload = value
        if status:
            _raise_unless_ok(bytes(status))
    except wire.WireError:
        raise RpcError(StatusCode.INTERNAL, "the response is not a valid ttrpc.Response") from None
    return payload


def _raise_unless_ok(status: bytes) -> None:
    """Raise the RpcError of a ttrpc.Status, unless it is OK.  Raises WireError if it is invalid."""
    code, text = 0, ""
    details: list[tuple[str, bytes]] = []
    for number, value in wire.decode(status):
        if isinstance(value, int):
            code = value if number == 1 else code
        elif number == 2:
            text = value[: 4 * MAX_ERROR_TEXT].decode(errors="replace")[:MAX_ERROR_TEXT]
        elif number == 3 and len(details) < MAX_DETAILS:
            fields = {one: part for one, part in wire.decode(value) if isinstance(part, bytes)}
            details.append((fields.get(1, b"").decode(errors="replace"), fields.get(2, b"")))
    if code:
        raise RpcError(StatusCode(code) if code in StatusCode._value2member_map_ else StatusCode.UNKNOWN, text, details)

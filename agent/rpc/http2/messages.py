"""HTTP requests and responses, whole.  Source: RFC 9113, section 8."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Buffer = bytes | bytearray | memoryview

#: Connection-specific header fields, which HTTP/2 does not have (section 8.2.2).
_FORBIDDEN = {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
_PSEUDO = (b":method", b":scheme", b":path", b":authority")


class HttpRequest:
    """A request.  ``body`` is truncated if it exceeds the server's limit."""

    def __init__(self, headers: dict[bytes, bytes]) -> None:
        self.headers = headers
        self.body = bytearray()


class HttpResponse:
    """A response: field blocks (hpack.encode) around the body; without body and trailers, the header alone."""

    def __init__(self, header: bytes, body: Sequence[Buffer] = (), trailers: bytes = b"") -> None:
        self.header = header
        self.body = body
        self.trailers = trailers


def request_headers(fields: list[tuple[bytes, bytes]]) -> dict[bytes, bytes] | None:
    """Return a request's fields by name, or None where the request is malformed (sections 8.2 and 8.3)."""
    headers: dict[bytes, bytes] = {}
    for name, value in fields:
        if name.startswith(b":"):
            if name not in _PSEUDO or name in headers or any(one[:1] != b":" for one in headers):
                return None
        elif name != name.lower() or name in _FORBIDDEN or (name == b"te" and value != b"trailers"):
            return None
        headers[name] = value
    return headers if all(headers.get(name) for name in _PSEUDO[:3]) else None

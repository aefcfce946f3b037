"""gRPC's unary calls as HTTP/2 requests: a codec over the dispatch.  Source: grpc/grpc, doc/PROTOCOL-HTTP2.md.

Our own instead of grpcio, whose wheels cannot use vsock: every byte would be relayed through a Unix socket, and under
emulation a call takes three times as long.
"""

from __future__ import annotations

from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.http2 import hpack
from caisson.agent.rpc.http2.messages import HttpRequest, HttpResponse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.rpc.dispatch import Dispatch

#: Bytes of a message: gRPC's default limit.
MAX_MESSAGE = 4 << 20

#: Bytes before a message: whether it is compressed, and its length.
PREFIX_SIZE = 5

_CONTENT_TYPE = b"application/grpc"
_HEADERS = ((b":status", b"200"), (b"content-type", _CONTENT_TYPE))
_HEADER = hpack.encode(*_HEADERS)
_OK = hpack.encode((b"grpc-status", b"0"))

#: Seconds of the units of grpc-timeout.
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


async def serve(dispatch: Dispatch, request: HttpRequest) -> HttpResponse:
    """Answer a request from a dispatch."""
    headers = request.headers
    if headers[b":method"] != b"POST" or not headers.get(b"content-type", b"").startswith(_CONTENT_TYPE):
        return HttpResponse(hpack.encode((b":status", b"415")))
    problem = _problem(request.body)
    if problem is not None:
        return _failure(*problem)
    try:
        timeout = _timeout(headers.get(b"grpc-timeout"))
    except ValueError:
        return _failure(StatusCode.INTERNAL, "grpc-timeout: not a valid timeout")
    path = headers[b":path"].decode("latin-1")
    payload = bytes(memoryview(request.body)[PREFIX_SIZE:])
    request.body = bytearray()  # free it during the call
    code, result = await dispatch.call(path, payload, timeout)
    if not isinstance(result, list):
        return _failure(code, result.text)
    length = sum(map(len, result))
    return HttpResponse(_HEADER, [b"\0" + length.to_bytes(PREFIX_SIZE - 1, "big"), *result], _OK)


def _problem(body: bytearray) -> tuple[StatusCode, str] | None:
    """Return what is wrong with a body that must be one message."""
    length = int.from_bytes(body[1:PREFIX_SIZE], "big")
    if length > MAX_MESSAGE:
        text = f"received message larger than max ({length} vs. {MAX_MESSAGE})"
        return StatusCode.RESOURCE_EXHAUSTED, text
    if len(body) != PREFIX_SIZE + length:
        return StatusCode.INTERNAL, "the request's body is not one whole message"
    if body[0]:
        return StatusCode.UNIMPLEMENTED, "the request's message is compressed"
    return None


def _timeout(value: bytes | None) -> float | None:
    """Decode grpc-timeout: up to eight digits and a unit.  Returns seconds; raises ValueError."""
    if value is None:
        return None
    digits, unit = value[:-1], value[-1:]
    if not digits.isdigit() or len(digits) > 8 or unit not in _UNITS:
        raise ValueError(value)
    return int(digits) * _UNITS[unit]


def _failure(code: StatusCode, text: str) -> HttpResponse:
    """Build a trailers-only response, with the text percent-encoded as the protocol requires."""
    message = "".join(chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}" for byte in text.encode())
    return HttpResponse(hpack.encode(*_HEADERS, (b"grpc-status", b"%d" % code), (b"grpc-message", message.encode())))

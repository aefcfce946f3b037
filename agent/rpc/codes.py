"""The status codes of gRPC."""

from __future__ import annotations

from enum import IntEnum


class StatusCode(IntEnum):
    """gRPC's (doc/statuscodes.md of grpc/grpc)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13

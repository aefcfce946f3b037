"""gRPC to an agent: of Kata Containers 1.x, or one of ours by choice.  Imported only on request.

The 1.x API has no reasons, only texts that its agents and hosts agree on; they are mapped to reasons only here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpc

from caisson.agent.client.errors import AgentError, Reason, connection_error, error_from_status
from caisson.agent.rpc.codes import StatusCode

MIB = 1 << 20

#: A guest's agent is one hop away: reconnect at once, not after gRPC's default of a second.
CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    # Named a backoff, but for gRPC also the timeout of an attempt, and a busy guest without KVM is slow.
    ("grpc.min_reconnect_backoff_ms", 20_000),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_http_proxy", 0),
    # The peer of a Unix socket has no name; without this the path itself becomes the :authority.
    ("grpc.default_authority", "agent"),
    # 4 MiB of output arrive in one frame: the agent need not wait for window, nor split them into 16 KiB.
    ("grpc.http2.lookahead_bytes", 4 * MIB),
    ("grpc.http2.max_frame_size", 5 * MIB),
]

#: Texts of 1.x that say more than their codes (docker and containerd also match some).
TEXTS = (
    ("executable file not found in $PATH", "exec: ", Reason.PROGRAM_NOT_FOUND),
    ("no such file or directory", "exec: ", Reason.PROGRAM_NOT_FOUND),
    ("permission denied", "exec: ", Reason.PROGRAM_NOT_EXECUTABLE),
    ("is a directory", "exec: ", Reason.PROGRAM_NOT_EXECUTABLE),
    ("input/output error", "", Reason.END_OF_OUTPUT),  # from a terminal whose last process has exited
    ("Cannot exec in stopped container", "", Reason.CONTAINER_STOPPED),
    ("Cannot exec in paused container", "", Reason.CONTAINER_PAUSED),
)


class GrpcChannel:
    """A channel by gRPC."""

    generation = 1
    cancels = True
    in_order = False  # each is a stream of its own, and a short one overtakes a long one

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """``path`` is the Unix socket of a VM's agent."""
        self._channel = grpc.aio.insecure_channel(f"unix:{Path(path).resolve()}", options=CHANNEL_OPTIONS)
        self._methods: dict[tuple[str, str], Any] = {}

    async def call(self, service: str, method: str, payload: bytes, timeout: float | None) -> bytes:
        key = service, method
        if key not in self._methods:
            self._methods[key] = self._channel.unary_unary(f"/{service}/{method}")
        try:
            return bytes(await self._methods[key](payload, timeout=timeout))
        except grpc.aio.AioRpcError as failure:
            raise _error(failure) from failure

    async def close(self) -> None:
        await self._channel.close()


def _error(failure: grpc.aio.AioRpcError) -> AgentError:
    code, text = StatusCode(failure.code().value[0]), failure.details() or ""
    if code is StatusCode.UNAVAILABLE:  # the text is gRPC's, about sockets and addresses
        return connection_error("the connection is closed")
    return agent_error(code, text)


def agent_error(code: StatusCode, text: str) -> AgentError:
    """Return the error for a status of 1.x."""
    return error_from_status(code, text, _reason(code, text))


def _reason(code: StatusCode, text: str) -> Reason:
    if code is StatusCode.UNKNOWN and text == "EOF":
        return Reason.END_OF_OUTPUT
    if code is StatusCode.NOT_FOUND and text.startswith("Container "):
        return Reason.CONTAINER_NOT_FOUND
    return next((reason for one, other, reason in TEXTS if one in text and other in text), Reason.UNSPECIFIED)

"""ttrpc to an agent: connected on the first call, and reconnected if the connection is lost.

`AgentChannel` is the interface of channels; the one for gRPC, for Kata 1.x agents, is in grpc_channel.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from caisson.agent.client.errors import AgentError, agent_error, connection_error
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.blocking import BlockingClient
from caisson.agent.rpc.ttrpc.responses import RpcError

if TYPE_CHECKING:
    from caisson.agent.rpc.ttrpc.client import Client


class AgentChannel(Protocol):
    """Carry calls to one agent."""

    #: The generation of Kata's API at the other end: 1, which hosts speak over gRPC, or 3, over ttrpc.
    generation: int

    #: Whether cancelling a call here also cancels it in the agent.
    cancels: bool

    #: Whether the agent begins calls in the order in which they are made here.
    in_order: bool

    async def call(self, service: str, method: str, payload: bytes, timeout: float | None) -> bytes:
        """Call a method with an encoded request and a timeout in seconds; returns the encoded response.

        Raises AgentError.
        """

    async def close(self) -> None:
        """Close the connection; calls in progress raise AgentGone."""


class TtrpcChannel:
    """A channel over ttrpc, which cannot cancel calls."""

    generation = 3
    cancels = False
    in_order = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """``path`` is the Unix socket of a VM's agent."""
        self._path = path
        self._client: Client | None = None
        self._connecting = asyncio.Lock()

    async def call(self, service: str, method: str, payload: bytes, timeout: float | None) -> bytes:
        with _agent_errors():
            client = self._client
            if client is None or client.closed:
                client = await self._connect()
            return await client.call(service, method, payload, timeout)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def _connect(self) -> Client:
        from caisson.agent.rpc.ttrpc.client import Client  # late: it executes asyncio, which others only import

        async with self._connecting:
            if self._client is None or self._client.closed:
                self._client = await Client.connect(self._path)
            return self._client


class BlockingChannel:
    """A channel over ttrpc whose calls block their thread: coroutines that await nothing else need no event loop."""

    generation = 3
    cancels = False
    in_order = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """``path`` is the Unix socket of a VM's agent."""
        self._path = path
        self._client: BlockingClient | None = None

    async def call(self, service: str, method: str, payload: bytes, timeout: float | None) -> bytes:
        with _agent_errors():
            if self._client is None:
                self._client = BlockingClient.connect(self._path)
            return self._client.call(service, method, payload, timeout)

    async def close(self) -> None:
        if self._client is not None:
            self._client.close()


@contextlib.contextmanager
def _agent_errors() -> Iterator[None]:
    """Raise AgentError in place of the errors of a call."""
    try:
        yield
    except RpcError as error:
        raise agent_error(error) from error
    except OSError as error:
        raise connection_error((error.strerror or str(error)).lower()) from error
    except ValueError as error:  # longer than ttrpc carries
        raise AgentError(StatusCode.RESOURCE_EXHAUSTED, str(error)) from error

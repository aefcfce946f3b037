"""The agent's listening socket, on vsock or Unix, and which peers it accepts.

Listening comes before everything else, asyncio included: a host that connects early waits in the kernel's queue instead
of failing.
"""

from __future__ import annotations

import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import BaseProtocol
    from collections.abc import AsyncIterator, Callable

    from caisson.agent.base.log import Log

#: Only the host may connect to the agent.  Containers can use vsock too, as it has no namespaces.
HOST_CID = 2
ANY_CID = 0xFFFFFFFF

BACKLOG = 1024


class ListenError(Exception):
    """An invalid address, or one that cannot be listened on."""


def listen(address: str) -> socket.socket:
    """Listen on ``vsock:PORT`` or ``unix:PATH`` (mode 0600); returns the socket.  Raises ListenError."""
    kind, _, place = address.partition(":")
    try:
        if kind == "vsock" and place.isascii() and place.isdecimal():
            listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            listener.bind((ANY_CID, int(place)))
        elif kind == "unix" and place:  # an empty path is an autobind address, which has no mode (unix(7))
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            before = os.umask(0o177)
            try:
                listener.bind(place)
            finally:
                os.umask(before)
        else:
            raise ListenError(f"{address!r}: not a valid address; use vsock:PORT or unix:PATH")
        listener.listen(BACKLOG)
    except (OSError, OverflowError, ValueError) as error:
        raise ListenError(f"{address}: cannot listen: {error}") from error
    listener.setblocking(False)
    return listener


async def accept(listener: socket.socket, protocol: Callable[[], BaseProtocol], log: Log) -> None:
    """Accept connections until cancelled, each with its own protocol instance."""
    import asyncio

    async for connection in connections(listener, log):
        try:
            await asyncio.get_running_loop().connect_accepted_socket(protocol, connection)
        except OSError as error:
            log("warning", "a connection was lost while it was accepted", error=str(error))
            connection.close()


async def connections(listener: socket.socket, log: Log) -> AsyncIterator[socket.socket]:
    """Yield the connections of peers that may connect."""
    import asyncio

    loop = asyncio.get_running_loop()
    while True:
        try:
            connection, peer = await loop.sock_accept(listener)
        except OSError as error:
            # Probably out of descriptors: the queue is served once some are closed.
            log("error", "accept failed", error=str(error))
            await asyncio.sleep(0.1)
            continue
        if connection.family == socket.AF_VSOCK and peer[0] != HOST_CID:
            log("warning", "refused a connection that is not from the host", cid=peer[0])
            connection.close()
        else:
            yield connection

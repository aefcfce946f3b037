"""The agent's address: a socket on vsock (or a Unix socket), and who may connect.

Listening comes before everything else, asyncio included: a host that connects early waits in the kernel's queue instead
of failing.
"""

from __future__ import annotations

import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import BaseProtocol
    from collections.abc import Callable

    from caisson.agent.base.log import Log

#: Only the host may drive the agent.  Containers share the guest's vsock address family, which no namespace divides.
HOST_CID = 2
ANY_CID = 0xFFFFFFFF

BACKLOG = 1024


class AddressError(Exception):
    """The address is no address, or cannot be listened on."""


def listen(address: str) -> socket.socket:
    """A listening socket for ``vsock:PORT`` or ``unix:PATH`` (mode 0600).  Raises AddressError."""
    kind, _, place = address.partition(":")
    try:
        if kind == "vsock" and place.isascii() and place.isdecimal():
            listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            listener.bind((ANY_CID, int(place)))
        elif kind == "unix" and place:  # an empty path would be an address that anybody can connect to (unix(7))
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            before = os.umask(0o177)
            try:
                listener.bind(place)
            finally:
                os.umask(before)
        else:
            raise AddressError(f"{address!r} is no address: vsock:PORT or unix:PATH")
        listener.listen(BACKLOG)
    except (OSError, OverflowError, ValueError) as error:
        raise AddressError(f"cannot listen on {address}: {error}") from error
    listener.setblocking(False)
    return listener


async def accept(listener: socket.socket, protocol: Callable[[], BaseProtocol], log: Log) -> None:
    """Give each connection a protocol of its own, until cancelled."""
    import asyncio

    loop = asyncio.get_running_loop()
    while True:
        try:
            connection, peer = await loop.sock_accept(listener)
        except OSError as error:
            # Out of descriptors, most likely: those who wait are served when some come back.
            log("error", "accept failed", error=str(error))
            await asyncio.sleep(0.1)
            continue
        if connection.family == socket.AF_VSOCK and peer[0] != HOST_CID:
            log("warning", "refused a connection that is not the host's", cid=peer[0])
            connection.close()
            continue
        try:
            await loop.connect_accepted_socket(protocol, connection)
        except OSError as error:
            log("warning", "a connection was lost at once", error=str(error))
            connection.close()

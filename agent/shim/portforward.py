"""Port forwarding into a pod: CRI's server connects to localhost inside the pod's namespace on the host, and reaches
the guest.

A listener there accepts every connection to the loopback address (a nat rule redirects them) and connects to the same
port of the pod's address, from the host.  Servers that listen only on the guest's own loopback address are not
reachable. Source: iptables-extensions(8), REDIRECT; include/uapi/linux/netfilter_ipv4.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

from caisson.agent.base.aio import join
from caisson.agent.pods import network

#: getsockopt(2) at SOL_IP: the address that a redirected connection was made to, as a sockaddr_in.
SO_ORIGINAL_DST = 80

#: Seconds for a connection to the guest.
CONNECT_TIMEOUT = 10.0

RULE = "iptables -w -t nat -A OUTPUT -o lo -d 127.0.0.0/8 -p tcp ! --dport PORT -j REDIRECT --to-ports PORT"


class PortForwarder:
    """Connections to a pod's loopback address on the host, forwarded to an address of the guest."""

    def __init__(self, server: asyncio.Server) -> None:
        self._server = server

    @classmethod
    async def start(cls, namespace: str, address: str) -> PortForwarder:
        """Listen in a network namespace.  Raises NetworkError."""
        listener = await asyncio.to_thread(network.inside, namespace, _listen)
        try:
            rule = RULE.replace("PORT", str(listener.getsockname()[1]))
            await asyncio.to_thread(network.run, namespace, *rule.split())
            server = await asyncio.start_server(lambda *streams: _serve(address, *streams), sock=listener)
        except BaseException:
            listener.close()
            raise
        return cls(server)

    def close(self) -> None:
        """Stop accepting."""
        self._server.close()


def _listen() -> socket.socket:
    listener = socket.socket()
    try:
        listener.bind(("127.0.0.1", 0))
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


async def _serve(address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.closing(writer), contextlib.suppress(OSError):
        original = writer.get_extra_info("socket").getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
        _, port = struct.unpack_from("!HH", original)
        async with asyncio.timeout(CONNECT_TIMEOUT):
            there = await asyncio.open_connection(address, port)
        await join((reader, writer), there)

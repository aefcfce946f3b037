"""docker's name server for the guest: docker's only listens on 127.0.0.11 inside the pod's namespace on the host.

The guest queries another address, which the tap device has on the host's side: packets for it are not redirected but
answered here, by querying docker's server in the same namespace.  Source: RFC 1035, section 4; tc-u32(8).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from typing import Any

from caisson.agent.base.aio import join
from caisson.agent.pods import network

#: docker's name server, and the address (link-local: no network has it) by which the guest reaches it.
DOCKERS, OURS = "127.0.0.11", "169.254.0.11"

PORT = 53

#: Maximum pending queries: docker has answered, or never will, those before.
MAX_QUERIES = 1024

#: Bytes of a message's header, and of a message over UDP with extensions (RFC 6891).
HEADER, MAX_MESSAGE = 12, 1 << 16

CONNECT_TIMEOUT = 5.0


def rewritten(resolv_conf: str) -> str:
    """Return the guest's resolv.conf: docker's server is at another address there."""
    return re.sub(rf"(?m)^(nameserver\s+){re.escape(DOCKERS)}(?!\S)", rf"\g<1>{OURS}", resolv_conf)


class DnsForwarder:
    """Answer queries to OURS in a network namespace, by forwarding them to DOCKERS there."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._transports: list[asyncio.DatagramTransport] = []
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen.  Raises NetworkError."""
        loop = asyncio.get_running_loop()
        below, above, stream = await asyncio.to_thread(network.inside, self._namespace, _sockets)
        relay = _Relay()
        upper, _ = await loop.create_datagram_endpoint(lambda: _Upstream(relay), sock=above)
        lower, _ = await loop.create_datagram_endpoint(lambda: _Downstream(relay), sock=below)
        relay.upper, relay.lower = upper, lower
        self._transports = [upper, lower]
        self._server = await asyncio.start_server(self._serve, sock=stream)

    def close(self) -> None:
        """Stop answering."""
        for transport in self._transports:
            transport.close()
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(network.NetworkError, OSError):
            upstream = await asyncio.to_thread(network.inside, self._namespace, _connected)
            await join((reader, writer), await asyncio.open_connection(sock=upstream))


class _Relay:
    """Pending queries, by the ids sent to docker's server, as clients may use equal ones."""

    def __init__(self) -> None:
        self.upper: asyncio.DatagramTransport | None = None
        self.lower: asyncio.DatagramTransport | None = None
        self._pending: dict[int, tuple[bytes, Any]] = {}
        self._next = 0

    def ask(self, query: bytes, client: Any) -> None:
        if len(query) < HEADER or self.upper is None:
            return
        self._next = (self._next + 1) % (1 << 16)
        self._pending.pop(self._next, None)
        self._pending[self._next] = query[:2], client
        if len(self._pending) > MAX_QUERIES:
            del self._pending[next(iter(self._pending))]
        self.upper.sendto(self._next.to_bytes(2, "big") + query[2:])

    def answer(self, message: bytes) -> None:
        query_id, client = self._pending.pop(int.from_bytes(message[:2], "big"), (b"", None))
        if client is not None and self.lower is not None:
            self.lower.sendto(query_id + message[2:], client)


class _Downstream(asyncio.DatagramProtocol):
    def __init__(self, relay: _Relay) -> None:
        self._relay = relay

    def datagram_received(self, data: bytes, address: Any) -> None:
        self._relay.ask(data, address)


class _Upstream(asyncio.DatagramProtocol):
    def __init__(self, relay: _Relay) -> None:
        self._relay = relay

    def datagram_received(self, data: bytes, address: Any) -> None:
        self._relay.answer(data)


def _sockets() -> tuple[socket.socket, socket.socket, socket.socket]:
    """Return the guest's side and docker's over UDP, and the guest's over TCP."""
    made = [socket.socket(type=kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_DGRAM, socket.SOCK_STREAM)]
    try:
        below, above, stream = made
        below.bind((OURS, PORT))
        above.connect((DOCKERS, PORT))
        stream.bind((OURS, PORT))
        for one in made:
            one.setblocking(False)
    except OSError:
        for one in made:
            one.close()
        raise
    return below, above, stream


def _connected() -> socket.socket:
    upstream = socket.create_connection((DOCKERS, PORT), timeout=CONNECT_TIMEOUT)
    upstream.setblocking(False)
    return upstream

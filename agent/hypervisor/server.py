"""The service's process: a Unix socket that shims call, until SIGTERM; all VMs stop with it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from pathlib import Path

from caisson.agent.base.log import Log
from caisson.agent.base.tracing import Tracing
from caisson.agent.hypervisor.peer import Peer
from caisson.agent.hypervisor.service import SERVICE, HypervisorService, Sandboxes, status_of
from caisson.agent.rpc.dispatch import Dispatch
from caisson.agent.rpc.listener import ListenError, listen
from caisson.agent.rpc.server import BUFFER_SIZE
from caisson.agent.rpc.ttrpc.server import TtrpcConnection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from caisson.agent.pods.machines import Machines


class ServiceError(Exception):
    """The socket cannot be listened on; the text is one line."""


def serve(path: Path, machines: Machines, ready: Callable[[], None]) -> None:
    """Serve shims on a Unix socket, until SIGTERM or SIGINT; ``ready`` is called when they can connect.

    Raises ServiceError or OSError where it cannot be listened on.
    """
    asyncio.run(_serve(path, machines, ready))


async def _serve(path: Path, machines: Machines, ready: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    log = Log("info")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    sandboxes = Sandboxes(machines, log)
    server = _Server(sandboxes, log)
    with _listening(path) as listener:
        accepting = loop.create_task(server.accept(listener))
        ready()
        await stop.wait()
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
    await sandboxes.end_all()
    server.close()


@contextlib.contextmanager
def _listening(path: Path) -> Any:
    """Listen on a path, replacing the socket of a killed service; remove it afterwards."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise ServiceError(
                    f"{path}: another service is listening there; stop it, or choose another: --socket PATH"
                )
        path.unlink()
    try:
        listener = listen(f"unix:{path}")
    except ListenError as error:
        raise ServiceError(str(error)) from error
    try:
        yield listener
    finally:
        listener.close()
        path.unlink(missing_ok=True)


class _Server:
    """Connections, each with its own dispatch: calls act for the process at the other end."""

    def __init__(self, sandboxes: Sandboxes, log: Log) -> None:
        self._sandboxes = sandboxes
        self._log = log
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        self._connections: set[TtrpcConnection] = set()

    async def accept(self, listener: socket.socket) -> None:
        """Accept connections until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
                await loop.connect_accepted_socket(lambda: self._protocol(connection), connection)  # noqa: B023
            except OSError as error:  # probably out of descriptors
                self._log("error", "accept failed", error=str(error))
                await asyncio.sleep(0.1)

    def _protocol(self, connection: socket.socket) -> TtrpcConnection:
        service = HypervisorService(self._sandboxes, lambda: Peer(connection))
        dispatch = Dispatch(SERVICE.bind(service), self._log, Tracing(""), status_of)
        made = TtrpcConnection(dispatch, self._buffer, self._log, self._connections.discard)
        self._connections.add(made)
        return made

    def close(self) -> None:
        """Close all connections."""
        for connection in list(self._connections):
            connection.close()

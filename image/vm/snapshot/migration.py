"""Save and restore a guest's state by QEMU's migration, without its memory, which is a separate file.

The state goes through a Unix socket, which every QEMU supports and its sandbox allows; the sandbox denies `exec:`, and
`file:` needs 8.2.  Source: QEMU, docs/devel/migration (x-ignore-shared), qapi/migration.json.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from caisson.image.vm.errors import VMError
from caisson.image.vm.pace import scaled
from caisson.image.vm.qmp import QMP, QMPError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from caisson.image.vm.snapshot.ram import SavedFiles

#: Seconds for QEMU to answer, and to save or restore: the state is less than a MiB, the machine may be busy.
MIGRATION_TIMEOUT = 60.0

#: Polling interval in seconds, for states that QEMU does not announce.
POLL_INTERVAL = 0.005

#: Maximum bytes of a state.
MAX_STATE = 64 << 20

CAPABILITIES = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}


def save(monitor: Path, scratch: Path, alive: Callable[[], bool]) -> bytes:
    """Stop a guest whose memory is shared, and return the state of everything else.

    ``scratch`` is a path for a socket, ``alive`` returns whether QEMU is still running.  Raises VMError.
    """
    with _connect(monitor, alive) as qemu, socket.socket(socket.AF_UNIX) as server:
        server.bind(str(scratch))
        try:
            server.listen(1)
            server.settimeout(scaled(MIGRATION_TIMEOUT))
            qemu.execute("stop")
            qemu.execute("migrate-set-capabilities", CAPABILITIES)
            qemu.execute("migrate", {"uri": f"unix:{scratch}"})
            connection, _ = server.accept()
            with connection:
                connection.settimeout(scaled(MIGRATION_TIMEOUT))
                state = _receive(connection)
            _completed(qemu, "saved")
        except OSError as error:
            raise VMError(f"the guest's state could not be saved: {error.strerror or error}") from error
        finally:
            scratch.unlink(missing_ok=True)
    return state


def _receive(connection: socket.socket) -> bytes:
    """Receive a state up to its end.  Raises OSError, and VMError for one that is too large."""
    state = bytearray()
    while data := connection.recv(1 << 20):
        state += data
        if len(state) > MAX_STATE:
            raise VMError(f"the guest's state could not be saved: QEMU sent more than {MAX_STATE >> 20} MiB")
    return bytes(state)


def restore(
    monitor: Path,
    scratch: Path,
    saved: SavedFiles,
    version: str,
    alive: Callable[[], bool],
    plug: Iterable[tuple[str, dict[str, Any]]] = (),
) -> None:
    """Restore the state of a snapshot into a QEMU that waits for it (-incoming defer), and run the guest.

    ``version`` is the one that has saved it; ``plug``: commands that add devices before the guest resumes; the others
    are as above.  Raises VMError.
    """
    state = saved.state.read()
    with _connect(monitor, alive) as qemu:
        if qemu.version != version:
            from caisson.image.vm.snapshot.snapshot import TITLES, misfit

            raise misfit(saved.name, TITLES["qemu"], version, qemu.version)
        qemu.execute("migrate-set-capabilities", CAPABILITIES)
        qemu.execute("migrate-incoming", {"uri": f"unix:{scratch}"})
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(scaled(MIGRATION_TIMEOUT))
                connection.connect(str(scratch))
                connection.sendall(state)
        except OSError as error:
            raise VMError(f"QEMU did not take the snapshot's state: {error.strerror or error}") from error
        finally:
            scratch.unlink(missing_ok=True)
        _completed(qemu, "restored")
        for command, arguments in plug:
            qemu.execute(command, arguments)
        qemu.execute("cont")


def _connect(monitor: Path, alive: Callable[[], bool]) -> QMP:
    """Connect to a QEMU that is starting."""
    deadline = time.monotonic() + scaled(MIGRATION_TIMEOUT)
    while True:
        try:
            return QMP(monitor, scaled(MIGRATION_TIMEOUT))
        except QMPError:
            if not alive() or time.monotonic() > deadline:
                raise
        time.sleep(POLL_INTERVAL)


def _completed(qemu: QMP, what: str) -> None:
    """Wait until a migration has completed.  Raises VMError if it fails."""
    deadline = time.monotonic() + scaled(MIGRATION_TIMEOUT)
    while True:
        found = qemu.execute("query-migrate")
        status = found.get("status")
        if status == "completed":
            return
        if status in ("failed", "cancelled") or time.monotonic() > deadline:
            why = found.get("error-desc") or f"its status is {status}"
            raise VMError(f"the guest could not be {what}: {why}")
        time.sleep(POLL_INTERVAL)

"""The connection of a VM's starter to the supervisor: what is sent and reported on it, and the VM's exit."""

from __future__ import annotations

import contextlib
import subprocess
import time

from caisson.image.vm.errors import VMError
from caisson.image.vm.jsonsocket import JSONSocket
from caisson.image.vm.launch import SupervisorProcess
from caisson.image.vm.running import STOP_TIMEOUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class SupervisorConnection:
    """While it is open, the supervisor stops the VM if its starter exits.  ``exit_reason`` is set when it reports the
    VM's exit.
    """

    def __init__(self, supervisor: SupervisorProcess) -> None:
        self._socket = JSONSocket(supervisor.line)
        self._process: subprocess.Popen[bytes] | None = supervisor.process
        self.is_open = True
        self.exit_reason: str | None = None

    def send(self, message: dict[str, Any]) -> None:
        """Send a request.  Raises OSError if the supervisor has exited; ``receive`` tells why."""
        self._socket.send(message)

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """Return the next message.  Raises VMError if the VM has exited, and TimeoutError."""
        message = self._socket.receive(timeout)
        if message is None:
            message = {"ended": "its supervisor died"}
        if "ended" in message:
            self.exit_reason = str(message["ended"])
            raise VMError(self.exit_reason)
        return message

    def wait_for_exit(self, timeout: float) -> None:
        """Wait until the VM's exit is reported, for at most ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        with contextlib.suppress(VMError, TimeoutError):
            while self.exit_reason is None:
                self.receive(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Close it; the supervisor then stops the VM, unless it was told to detach."""
        self._socket.close()
        self.is_open = False

    def stop_vm(self) -> str:
        """Make the supervisor stop the VM and exit; returns the last output of QEMU and the guest."""
        if self.is_open:
            self._socket.finish()
            self.wait_for_exit(STOP_TIMEOUT)
            self.close()
        self.reap()
        return (self.exit_reason or "").partition("\n")[2]

    def reap(self) -> None:
        """Reap the supervisor, which exits."""
        if self._process is not None:
            try:
                self._process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()  # its children and the janitor clean up
                self._process.wait()
            self._process = None

"""Start the process that keeps a VM; its own code is supervisor.py.

A separate file, as it imports almost nothing: a shim starts this process first, and both import in parallel.
"""

from __future__ import annotations

import socket
import subprocess
import sys


class SupervisorProcess:
    """A supervisor that waits for a VM's configuration on ``line``, and exits when that closes."""

    def __init__(self) -> None:
        self.line, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "caisson.image.vm.supervisor", str(theirs.fileno())],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

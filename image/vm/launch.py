"""The process that keeps a VM, started by whoever wants one; its side is supervisor.py.

A file of its own, as it imports next to nothing: a shim starts this process first of all, and both import what they
need side by side.
"""

from __future__ import annotations

import socket
import subprocess
import sys


class SupervisorProcess:
    """A supervisor that waits for a VM's configuration on ``line``, and ends with that."""

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

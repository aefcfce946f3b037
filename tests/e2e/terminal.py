"""Run a Caisson command on a pseudo-terminal, as a user at a terminal does."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from typing import Any, Self

from tests.e2e.conftest import Caisson


class Terminal:
    """A command on a pseudo-terminal of a given size; as a context manager it ends with the block."""

    def __init__(self, caisson: Caisson, *words: str, rows: int = 31, columns: int = 97) -> None:
        # The command's side is kept open here, too: the kernel resets a terminal's modes when nobody has it open.
        self.fd, self._other = pty.openpty()
        self.resize(rows, columns)
        self.before = self.modes()
        self.process = caisson.start(
            *words,
            stdin=self._other,
            stdout=self._other,
            stderr=self._other,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.output = b""

    def modes(self) -> list[Any]:
        """Return the terminal's current modes (tcgetattr(3))."""
        return termios.tcgetattr(self._other)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def expect(self, text: bytes, timeout: float = 120.0) -> bytes:
        """Read until ``text`` is shown; return, and drop, what came before it."""
        deadline = time.monotonic() + timeout
        while text not in self.output:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self.fd, 65536) if ready else b""
            assert data, f"{text!r} was not shown; got {self.output!r}"
            self.output += data
        before, _, self.output = self.output.partition(text)
        return before

    def status(self, timeout: float = 120.0) -> int:
        """Wait for the command to exit; return its status.  Its last output is in ``output``."""
        deadline = time.monotonic() + timeout
        ended = os.pidfd_open(self.process.pid)
        try:
            while True:
                ready, _, _ = select.select([self.fd, ended], [], [], max(0, deadline - time.monotonic()))
                if self.fd in ready:
                    self.output += os.read(self.fd, 65536)
                elif ended in ready:
                    return self.process.wait()
                else:
                    raise subprocess.TimeoutExpired(self.process.args, timeout, self.output)
        finally:
            os.close(ended)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)
        os.close(self._other)

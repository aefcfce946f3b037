"""The processes of a VM: tied to their supervisor, watched by descriptors, ended within a bounded time."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Self

from caisson.image.parent_death import process_killed_with_parent

#: Seconds that a process gets to end after it was asked to, each time.
TERM_TIMEOUT = 3.0

#: What they are called in what is said to people.
TITLES = {"qemu": "QEMU", "vsock": "the vsock device"}


#: The end of a VM that nothing is wrong with.
POWERED_OFF = "the guest has powered off"


class Children:
    """Children by name.  As a context manager it ends them all, the last one first."""

    def __init__(self, log: IO[bytes], grace: float = TERM_TIMEOUT) -> None:
        """``log`` takes their stdout and stderr."""
        self._log = log
        self._grace = grace
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._pidfds: dict[int, str] = {}  # readable when the child has ended
        self._helpers: set[str] = set()
        self._ask: dict[str, Callable[[], bool]] = {}

    @property
    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self._processes.items()}

    @property
    def pidfds(self) -> list[int]:
        """Descriptors that become readable when a child has ended without which the others are of no use."""
        return [pidfd for pidfd, name in self._pidfds.items() if name not in self._helpers]

    def spawn(self, name: str, words: Sequence[str], fds: Iterable[int], *, helper: bool = False) -> None:
        """Start a child that has these descriptors, and that the kernel kills when this process dies.

        The end of a ``helper`` is nobody's business.
        """
        process = subprocess.Popen(
            process_killed_with_parent(words),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=list(fds),
        )
        self._processes[name] = process
        if helper:
            self._helpers.add(name)
        self._pidfds[os.pidfd_open(process.pid)] = name

    def is_running(self, name: str) -> bool:
        """Whether a child runs."""
        return self._processes[name].poll() is None

    def set_quit(self, name: str, ask: Callable[[], bool]) -> None:
        """Before SIGTERM, this child is to be asked: ``ask`` does so, and returns whether it will end."""
        self._ask[name] = ask

    def exit_reason(self, ready: Iterable[object]) -> str | None:
        """What became of the first child whose descriptor is among those that are readable, in words."""
        names = {self._pidfds[descriptor] for descriptor in ready if descriptor in self._pidfds}
        if not names:
            return None
        if "vsock" in names and self._processes["vsock"].wait() == 0 and self._ended("qemu"):
            names = {"qemu"}  # the device ends well when QEMU has let go of it
        name = min(names)  # qemu rather than vsock
        status = self._processes[name].wait()
        title = TITLES.get(name, name)
        if name == "qemu" and status == 0:
            return POWERED_OFF
        if status < 0:
            return f"{title} was ended by signal {-status} ({signal.strsignal(-status)})"
        return f"{title} exited with status {status}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self._processes)):
            self.end(name)

    def end(self, name: str) -> None:
        """End a child; fine when it has, or there never was one."""
        if name not in self._processes:
            return
        process, ask = self._processes[name], self._ask.get(name)
        if not (process.poll() is None and ask and ask() and self._ended(name)):
            process.terminate()
            if not self._ended(name):
                process.kill()
        process.wait()
        del self._processes[name]
        for pidfd in [pidfd for pidfd, other in self._pidfds.items() if other == name]:
            del self._pidfds[pidfd]
            os.close(pidfd)

    def _ended(self, name: str) -> bool:
        """Whether it ends within its time."""
        mine = [pidfd for pidfd, other in self._pidfds.items() if other == name]
        ready, _, _ = select.select(mine, [], [], self._grace)
        return bool(ready)

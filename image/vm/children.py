"""The processes of a VM: tied to their supervisor, watched through descriptors, ended within a bounded time."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterable, Sequence

from caisson.image.vm.errors import VMError
from caisson.image.vm.exit_reason import POWERED_OFF, TITLES
from caisson.image.vm.sandbox import Confinement

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Self

#: Processes that are killed without being asked to exit: what they would clean up disappears with the guest, and takes
#: QEMU 30 ms.  What it has written to a disk is in the host's page cache already.
KILLED = ("qemu", "vsock")

#: Seconds for any other to exit on request; then it is killed, as it has no state to lose.
TERM_TIMEOUT = 0.6

#: Seconds for QEMU to exit after it has closed the vsock device's socket: it frees the guest's memory in between.
QEMU_EXIT_TIMEOUT = 20.0


class ChildProcesses:
    """Child processes by name.  As a context manager it ends them all, last one first."""

    def __init__(self, log: IO[bytes]) -> None:
        """``log`` gets their stdout and stderr."""
        self._log = log
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._pidfds: dict[int, str] = {}  # readable when the child has exited
        self._helpers: set[str] = set()

    @property
    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self._processes.items()}

    @property
    def pidfds(self) -> list[int]:
        """Return the pidfds of the children whose exit ends the VM."""
        return [pidfd for pidfd, name in self._pidfds.items() if name not in self._helpers]

    def spawn(
        self, name: str, words: Sequence[str], fds: Iterable[int], confinement: Confinement, *, helper: bool = False
    ) -> None:
        """Start a confined child with these descriptors, which the kernel kills when this process dies.

        The VM does not end when a ``helper`` does.  Raises VMError.
        """
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=list(fds),
                preexec_fn=confinement.preexec(),
            )
        except OSError as error:
            raise VMError(f"{words[0]} cannot be started: {error.strerror}") from error
        except subprocess.SubprocessError as error:
            raise VMError(
                f"{TITLES.get(name, name)} cannot be sandboxed: this kernel lacks the features for it"
            ) from error
        self._processes[name] = process
        if helper:
            self._helpers.add(name)
        self._pidfds[os.pidfd_open(process.pid)] = name

    def is_running(self, name: str) -> bool:
        """Return whether a child is running."""
        return self._processes[name].poll() is None

    def exit_reason(self, ready: Iterable[object]) -> str | None:
        """Describe how the first child with a readable descriptor exited."""
        names = {self._pidfds[descriptor] for descriptor in ready if descriptor in self._pidfds}
        if not names:
            return None
        clean = all(self._processes[name].wait() == 0 for name in names - {"qemu"})
        if clean and self._ended("qemu", QEMU_EXIT_TIMEOUT):
            names = {"qemu"}  # the others exit cleanly when QEMU has closed its end
        name = min(names)  # qemu rather than the others
        status = self._processes[name].wait()
        title = TITLES.get(name, name)
        if name == "qemu" and status == 0:
            return POWERED_OFF
        if status < 0:
            return f"{title} was killed by signal {-status} ({signal.strsignal(-status)})"
        return f"{title} exited with status {status}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self._processes)):
            self.end(name)

    def end(self, name: str) -> None:
        """End a child, if it is running."""
        if name not in self._processes:
            return
        process = self._processes[name]
        if name not in KILLED:
            process.terminate()
        if name in KILLED or not self._ended(name, TERM_TIMEOUT):
            process.kill()
        process.wait()
        del self._processes[name]
        for pidfd in [pidfd for pidfd, other in self._pidfds.items() if other == name]:
            del self._pidfds[pidfd]
            os.close(pidfd)

    def _ended(self, name: str, seconds: float) -> bool:
        """Wait for a child; True if it exits in time."""
        mine = [pidfd for pidfd, other in self._pidfds.items() if other == name]
        ready, _, _ = select.select(mine, [], [], seconds)
        return bool(ready)

"""The nsexec program: sealed in memory once, and spawned from there."""

from __future__ import annotations

import fcntl
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Iterable, Mapping
    from pathlib import Path
else:  # without the enums around them
    import _signal as signal

MFD_EXEC = 0x10  # Linux 6.3; before that every memfd is executable
#: Signals to reset: all of them, so that nsexec starts with none ignored.  For any other signal, libc would query the
#: handler first.
SIGNALS = tuple(signal.valid_signals())
SEALS = 0xF  # F_SEAL_SEAL | SHRINK | GROW | WRITE, fcntl(2)


class Nsexec:
    """A copy of nsexec that nothing can write to, not even root in a container that reached it (CVE-2019-5736)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def seal(cls, path: str | Path) -> Nsexec:
        """Copy the program into a sealed memfd.  Raises OSError."""
        with open(path, "rb") as file:  # noqa: PTH123 - no pathlib at start
            program = file.read()
        try:
            fd = os.memfd_create("nsexec", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | MFD_EXEC)
        except OSError:
            fd = os.memfd_create("nsexec", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            view = memoryview(program)
            while view:
                view = view[os.write(fd, view) :]
            os.fchmod(fd, 0o511)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        except OSError:
            os.close(fd)
            raise
        return cls(fd)

    def close(self) -> None:
        """Close the program.  Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def spawn(self, stdio: tuple[int, int, int] | None, child_fds: Iterable[int], env: Mapping[str, str]) -> int:
        """Start it and return its pid.  `stdio` None is /dev/null; `child_fds` descriptors keep their numbers
        (see `env`).

        By posix_spawn: the agent has threads and must never fork.  Raises OSError.
        """
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = []
        moved: list[int] = []
        try:
            if stdio is None:
                actions += [
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
                    (os.POSIX_SPAWN_DUP2, 0, 1),
                    (os.POSIX_SPAWN_DUP2, 0, 2),
                ]
            else:
                for target, fd in enumerate(stdio):
                    if fd < 3 and fd != target:  # an earlier DUP2 would have replaced it
                        fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
                        moved.append(fd)
                    actions.append((os.POSIX_SPAWN_DUP2, fd, target))
            # Onto itself: the number stays, close-on-exec goes (posix_spawn_file_actions_adddup2(3)).
            actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in child_fds]
            program = f"/proc/self/fd/{self._fd}"
            return os.posix_spawn(program, ["nsexec"], env, file_actions=actions, setsigdef=SIGNALS)
        finally:
            for fd in moved:
                os.close(fd)

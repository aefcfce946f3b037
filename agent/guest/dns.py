"""Name servers for the guest: the host's resolv.conf, bound over the guest's own."""

from __future__ import annotations

import os

from caisson.agent.base import syscalls
from caisson.agent.base.errors import SystemCallFailed, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

TARGET = "/etc/resolv.conf"
SOURCE = "/run/kata-containers/sandbox/resolv.conf"


class Resolver:
    """The guest's resolv.conf.  It is read-only, so another one is bind-mounted over it, which containers then see."""

    def __init__(self) -> None:
        self._set = False

    def set(self, lines: Sequence[str]) -> bool:
        """Set these lines; does nothing if there are none.  False if the guest has no such file.

        Raises SystemCallFailed; nothing changes then.
        """
        if not lines:
            return True
        if not os.path.lexists(TARGET):
            return False
        try:
            os.makedirs(os.path.dirname(SOURCE), mode=0o755, exist_ok=True)  # noqa: PTH103, PTH120
            fd = os.open(SOURCE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            with open(fd, "w") as file:  # noqa: PTH123 - no pathlib at start
                file.write("\n".join(line.strip() for line in lines) + "\n")
            syscalls.mount(SOURCE, TARGET, None, syscalls.MS_BIND)
        except OSError as error:
            self._forget_source()
            raise SystemCallFailed(f"{TARGET}: {reason(error)}") from error
        self._set = True
        return True

    def release(self) -> None:
        """Restore the guest's own.  Idempotent."""
        if not self._set:
            return
        self._set = False
        try:
            syscalls.umount2(TARGET, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        except OSError:
            pass  # already unmounted
        self._forget_source()

    def _forget_source(self) -> None:
        try:
            os.unlink(SOURCE)  # noqa: PTH108
            os.removedirs(os.path.dirname(SOURCE))  # noqa: PTH120 - those that are empty now
        except OSError:
            pass

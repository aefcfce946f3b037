"""The child processes of the runtime, and their owner, who waits for them.

An agent has one owner of all children (model/reaper.py); a command waits for its own here.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Protocol

    class Child(Protocol):
        """A child process, until it exits."""

        pid: int

        async def wait(self) -> int:
            """Wait for the exit status: 0-255, or 128 + signal.  Any number of waiters."""
            ...

    class Expecting(Protocol):
        """A block in which exit statuses of unknown pids are kept."""

        def __enter__(self) -> None: ...

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None, /
        ) -> bool | None: ...

    class Children(Protocol):
        """The owner of child processes."""

        def expecting(self) -> Expecting:
            """Keep exit statuses of unknown pids for `claim` while inside."""
            ...

        def claim(self, pid: int) -> Child:
            """Route this pid's exit to the returned Child from now on."""
            ...


class OwnChild:
    """A child that its parent waits for by pid."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None

    async def wait(self) -> int:
        """Wait by waitpid(2)."""
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)  # noqa: ASYNC222 - a program without an event loop
            code = os.waitstatus_to_exitcode(status)
            self.status = code if code >= 0 else 128 - code
        return self.status


class OwnChildren:
    """Children of a program without an event loop: a zombie keeps its pid until it is waited for."""

    def expecting(self) -> OwnChildren:
        """Do nothing: no status is lost."""
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def claim(self, pid: int) -> OwnChild:
        """Return the child of this pid."""
        return OwnChild(pid)

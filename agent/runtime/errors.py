"""The failure of a command."""

from __future__ import annotations


class CommandError(Exception):
    """A command that failed; str() is the message that callers match.  `status` None is the command's usual one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status

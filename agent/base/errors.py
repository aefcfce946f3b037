"""What the model refuses.  The API turns each kind into its gRPC status; the texts are for the user."""

from __future__ import annotations


class ModelError(Exception):
    """A request that cannot be done."""


class NotFound(ModelError):
    """There is no such container or process."""


class AlreadyExists(ModelError):
    """The id is taken."""


class WrongState(ModelError):
    """Not now: the sandbox, container or process is not in a state for it."""


class Refused(ModelError):
    """Not now, either; in words that hosts know, which come without a status of their own."""


class Failed(ModelError):
    """It was tried, and the kernel would not."""


class Invalid(ModelError):
    """Never: the request makes no sense."""


class Unsupported(ModelError):
    """Not by this agent."""


class TooLate(ModelError):
    """It was not done within the time the caller gave."""


class EndOfStream(ModelError):
    """All output was delivered."""

    def __init__(self) -> None:
        super().__init__("EOF")


class BrokenStream(ModelError):
    """Nobody reads what is written."""


class Ended(ModelError):
    """The process has ended; a signal comes too late."""

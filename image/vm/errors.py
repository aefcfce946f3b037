"""What can go wrong with a virtual machine, in words for the person who started it."""

from __future__ import annotations


class VMError(Exception):
    """A VM could not be started, found or kept; the text says what, why and, where there is one, the way out."""


class InvalidOption(VMError):
    """A value that a VM cannot be given, whatever the state of this machine's VMs: the caller's to change."""


class VMEnded(VMError):
    """A VM has ended while it was used; ``reason`` says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"VM {name!r}: the VM has ended: {reason}")
        self.reason = reason

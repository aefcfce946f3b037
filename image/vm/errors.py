"""Errors of virtual machines, with messages for the user."""

from __future__ import annotations


class VMError(Exception):
    """A VM could not be started, found or kept; the text names the problem, the cause and, if there is one, the
    remedy.
    """


class InvalidOption(VMError):
    """An invalid option, whatever the state of this machine's VMs: the caller must change it."""


class NoEmptyPort(VMError):
    """Nothing can be plugged into a VM for now."""


class VMEnded(VMError):
    """A VM has exited while in use; ``reason`` says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"VM {name!r}: the VM has ended: {reason}")
        self.reason = reason

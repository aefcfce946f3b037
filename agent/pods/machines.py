"""What the shim asks of virtual machines: a protocol, so that this half knows no QEMU (commands/shim.py has it)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class PodMachine(Protocol):
    """A running VM.  All methods block; all raise MachineError."""

    @property
    def agent_socket(self) -> Path:
        """The Unix socket that leads to the guest's agent."""

    @property
    def pid(self) -> int:
        """The process whose end is the VM's."""

    @property
    def is_clone(self) -> bool:
        """Whether it has the clock and the random numbers of a snapshot."""

    def end_share(self, tag: str) -> None:
        """Close all files of the share that it was started with, as the VM is about to end."""

    def share_of_namespace(self, directory: str, tag: str, mount_namespace: int) -> None:
        """Plug in a directory as another mount namespace has it, by the descriptor of that."""

    def add_interface(self, tap: int, mac: str) -> None:
        """Plug a network interface in, whose packets go through a tap device's descriptor."""

    def stop(self) -> None:
        """End it; returns when nothing of it is left."""


class Machines(Protocol):
    """Where VMs come from."""

    def start(self, name: str, *, memory: int, cpus: int, share: tuple[str, Path] | None = None) -> PodMachine:
        """Start a VM, with at least so many MiB and CPUs, and wait for its agent.

        ``share`` is a directory of the host that it has as a virtiofs device, after the tag of that.
        """

    @property
    def pids(self) -> Sequence[int]:
        """Processes that are there already for the next VM."""

    def stop(self, name: str) -> None:
        """End a VM by its name, if it runs."""

    def agent_socket(self, name: str) -> Path:
        """Return where the agent of a VM of this name is reached, once it runs."""


class MachineError(Exception):
    """A VM that could not be started, changed or stopped; the text is one line for the user."""


def machine_name(*ids: str) -> str:
    """Return the name of a pod's VM: short, as paths of sockets are."""
    return f"pod-{hashlib.sha256('/'.join(ids).encode()).hexdigest()[:16]}"

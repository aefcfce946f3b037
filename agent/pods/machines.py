"""The interface of virtual machines for the shim: a protocol, so that this half does not depend on QEMU
(commands/shim.py implements it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

#: The tag of a pod's share in Kata; the guest mounts it on GUEST_SHARED (proto/contract.py).
SHARE_TAG = "kataShared"


class PodMachine(Protocol):
    """A running VM.  All methods block; all raise MachineError."""

    @property
    def agent_socket(self) -> Path:
        """The Unix socket of the guest's agent."""

    @property
    def pid(self) -> int:
        """The process whose exit is the VM's."""

    @property
    def is_clone(self) -> bool:
        """Whether it has a snapshot's clock and random numbers."""

    @property
    def block_roots(self) -> bool:
        """Whether root file systems in files are to be plugged in as disks: an option."""

    def add_disk(self, file: Path, name: str, *, writable: bool, following: int) -> str:
        """Plug in a file as a disk, and return its PCI path.

        Raises NoPort if there are not enough ports for it and the ``following`` ones, without those for others.
        """

    def remove_disk(self, name: str) -> bool:
        """Unplug a disk, and close its file; False if the guest did not release it."""

    def end_share(self, tag: str) -> None:
        """Close all files of the share it was started with, as the VM is about to stop."""

    def share_of_namespace(self, directory: str, tag: str, mount_namespace: int) -> None:
        """Plug in a directory as seen in another mount namespace, given by its descriptor."""

    def add_interface(self, tap: int, mac: str) -> None:
        """Plug in a network interface whose packets go through a tap device's descriptor."""

    def stop(self) -> None:
        """Stop it; returns when nothing of it is left."""


class Machines(Protocol):
    """A source of VMs."""

    def start(self, name: str, *, memory: int, cpus: int, share: tuple[str, Path] | None = None) -> PodMachine:
        """Start a VM with at least this many MiB and CPUs, and wait for its agent.

        ``share`` is the tag of a virtiofs device and the host directory behind it.  The VM ends when the server of the
        share SHARE_TAG does.
        """

    @property
    def pids(self) -> Sequence[int]:
        """Processes already started for the next VM."""

    def stop(self, name: str) -> None:
        """Stop a VM by name, if it is running."""

    def agent_socket(self, name: str) -> Path:
        """Return the agent's socket for a VM of this name, once it runs."""


class MachineError(Exception):
    """A VM that could not be started, changed or stopped; the text is one line for the user."""


class NoPort(MachineError):
    """A VM takes no further disk."""


def machine_name(*ids: str) -> str:
    """Return the name of a pod's VM: short, to fit socket paths."""
    return f"pod-{hashlib.sha256('/'.join(ids).encode()).hexdigest()[:16]}"

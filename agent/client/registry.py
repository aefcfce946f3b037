"""Register what commands on this host have created in a VM: its containers and forwarded ports.

One JSON file per entry, in a directory that is removed with the VM.  The agent's API cannot list containers; an entry
only tells which names to query.

An entry that must not outlive its command, such as a forwarded port, is leased: its file is locked (flock(2)) until
that command closes it or dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path

from caisson.agent.client.errors import AgentGone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

    from caisson.agent.client.guest import Machine


class Registry:
    """Entries by name, each with JSON metadata."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def add(self, name: str, **metadata: Any) -> None:
        """Add or replace an entry.  Raises AgentGone if the VM has exited."""
        self._put(name, metadata).close()

    def lease(self, name: str, **metadata: Any) -> IO[str]:
        """Add an entry that is valid while the returned file is open.  Raises AgentGone."""
        return self._put(name, metadata | {"held": True})

    def _put(self, name: str, metadata: dict[str, Any]) -> IO[str]:
        # A name that no container can have: nobody sees a partial file, or one not locked yet.
        new = self._directory / f".{os.urandom(16).hex()}"
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(new.open("w"))
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(metadata))
                file.flush()
                new.rename(self._directory / name)
                stack.pop_all()
                return file
        except FileNotFoundError as error:
            raise AgentGone("the VM has ended") from error

    def discard(self, name: str) -> None:
        """Remove an entry, if there is one."""
        (self._directory / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Return the names, sorted."""
        try:
            return sorted(path.name for path in self._directory.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            return []

    def metadata(self, name: str) -> dict[str, Any]:
        """Return the metadata of an entry; empty if there is none."""
        try:
            return dict(json.loads((self._directory / name).read_text()))
        except FileNotFoundError:
            return {}

    def held(self, name: str) -> bool:
        """Check whether a living command holds its lease."""
        try:
            with (self._directory / name).open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def orphaned(self) -> list[str]:
        """Return the names of leased entries whose command has died."""
        return [name for name in self.names() if self.metadata(name).get("held") and not self.held(name)]


def container_registry(machine: Machine) -> Registry:
    """Return the registry of a VM's containers."""
    return Registry(machine.directory / "containers")


def forward_registry(machine: Machine) -> Registry:
    """Return the registry of a VM's forwarded ports."""
    return Registry(machine.directory / "ports")


def active_forwards(machine: Machine) -> list[str]:
    """List the ports currently forwarded: "127.0.0.1:8080 → tcp port 80"."""
    known = forward_registry(machine)
    for name in known.orphaned():
        known.discard(name)
    return known.names()

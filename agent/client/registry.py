"""What commands on this host have made of a VM: files in a directory that goes when the VM goes.

Its containers: the agent's API cannot list them.  A file only says where to look; what is true the agent says.  And the
ports that are forwarded.

Some things are no more than the command that made them, such as a forwarded port.  The file of such a thing is held: it
is locked (flock(2)) until that command lets go of it, or dies in whatever way.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

import grpc

from caisson.agent.client.connection import AgentGone


class Known:
    """Things by name, each with JSON values about it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def add(self, name: str, **about: Any) -> None:
        """Remember a thing, in place of an older one of this name.  Raises AgentGone when the VM has gone."""
        self._put(name, about).close()

    def hold(self, name: str, **about: Any) -> IO[str]:
        """Remember a thing that is there for as long as its maker keeps open what this returns.  Raises AgentGone."""
        return self._put(name, about | {"held": True})

    def _put(self, name: str, about: dict[str, Any]) -> IO[str]:
        # A name that no container can have: nobody sees half a file, or one that is not locked yet.
        new = self._directory / f".{name}.{os.getpid()}"
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(new.open("w"))
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(about))
                file.flush()
                new.rename(self._directory / name)
                stack.pop_all()
                return file
        except FileNotFoundError as error:
            raise AgentGone(grpc.StatusCode.UNAVAILABLE, "the VM has ended") from error

    def discard(self, name: str) -> None:
        """Forget a thing; fine when it is not known."""
        (self._directory / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Their names, in order."""
        try:
            return sorted(path.name for path in self._directory.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            return []

    def about(self, name: str) -> dict[str, Any]:
        """What was said about a thing when it was made; nothing about one that is not known."""
        try:
            return dict(json.loads((self._directory / name).read_text()))
        except FileNotFoundError:
            return {}

    def held(self, name: str) -> bool:
        """Whether a command that lives has it."""
        try:
            with (self._directory / name).open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def abandoned(self) -> list[str]:
        """The names of things whose maker has died and has not put them away."""
        return [name for name in self.names() if self.about(name).get("held") and not self.held(name)]

"""pytest -p agent.client.pytest_plugin: tests that run programs inside a guest, one for the session.

CAISSON_TEMPLATE names a template that it is made from; without, it boots the default image.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from agent.client.guest import Done, Guest


class GuestRunner:
    """A guest for tests that are no coroutines."""

    def __init__(self, runner: asyncio.Runner, guest: Guest) -> None:
        self._runner = runner
        self.guest = guest

    def run(self, *words: str, container: str = "default", stdin: bytes = b"") -> Done:
        """Run a program in a container of the guest to its end."""
        return self._runner.run(self.guest.run(*words, container=container, stdin=stdin))


@pytest.fixture(scope="session")
def caisson_guest() -> Iterator[GuestRunner]:
    """A guest that lives as long as the session."""
    with asyncio.Runner() as runner:
        guest = Guest(template=os.environ.get("CAISSON_TEMPLATE", ""))
        runner.run(guest.__aenter__())
        try:
            yield GuestRunner(runner, guest)
        finally:
            runner.run(guest.__aexit__())

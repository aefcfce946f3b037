"""pytest -p caisson.agent.client.pytest_plugin: tests that run programs inside a guest, one for the session.

Which guest that is, a fixture `caisson_machine` of the project's own says (docs/library.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from caisson.agent.client.guest import Done, Guest, Machine


class GuestRunner:
    """A guest for tests that are no coroutines."""

    def __init__(self, runner: asyncio.Runner, guest: Guest) -> None:
        self._runner = runner
        self.guest = guest

    def run(self, *words: str, container: str = "default", stdin: bytes = b"") -> Done:
        """Run a program in a container of the guest to its end."""
        return self._runner.run(self.guest.run(*words, container=container, stdin=stdin))


@pytest.fixture(scope="session")
def caisson_guest(caisson_machine: Machine) -> Iterator[GuestRunner]:
    """The guest of the session's VM."""
    with asyncio.Runner() as runner:
        guest = Guest(caisson_machine)
        runner.run(guest.__aenter__())
        try:
            yield GuestRunner(runner, guest)
        finally:
            runner.run(guest.__aexit__())

"""The pytest plugin `caisson`: tests that run programs inside a guest, one for the session.

The project's own fixture `caisson_machine` provides the guest (docs/library.md).  pytest loads this plugin in every
project of an environment, so it imports what it needs only when a guest is requested.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from caisson.agent.client.guest import CompletedRun, Guest, Machine


class GuestRunner:
    """A guest for tests that are not coroutines."""

    def __init__(self, runner: asyncio.Runner, guest: Guest) -> None:
        self._runner = runner
        self.guest = guest

    def run(self, *words: str, container: str = "default", stdin: bytes = b"") -> CompletedRun:
        """Run a program in a container of the guest to completion."""
        return self._runner.run(self.guest.run(*words, container=container, stdin=stdin))


@pytest.fixture(scope="session")
def caisson_guest(caisson_machine: Machine) -> Iterator[GuestRunner]:
    """Provide the guest of the session's VM."""
    from caisson.agent.client.guest import Guest

    with asyncio.Runner() as runner:
        guest = Guest(caisson_machine)
        runner.run(guest.__aenter__())
        try:
            yield GuestRunner(runner, guest)
        finally:
            runner.run(guest.__aexit__())

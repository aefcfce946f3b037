"""Test when the vhost-user device's loop polls, and when it sleeps."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator

import pytest

from caisson.image.vm.vsock.vhost_user.log import RateLimitedLog
from caisson.image.vm.vsock.vhost_user.loop import POLL_BACKOFF, Loop


class Calls:
    """Work that records what the loop asks of it, and whose event fires as soon as it rests."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.small = True
        self.stir: Callable[[], bool] = lambda: False
        self.turned: Callable[[], None] = lambda: None
        self.reader, self.writer = os.pipe()

    def event(self) -> None:
        os.write(self.writer, b"!")

    def hear(self) -> None:
        os.read(self.reader, 1)

    def process(self) -> bool:
        self.made.append("turn")
        self.turned()
        return False

    def worth_polling(self) -> bool:
        return self.small

    def has_available(self) -> bool:
        if self.made[-1] != "look":
            self.made.append("look")
        return self.stir()

    def enable_notifications(self) -> bool:
        self.made.append("rest")
        self.event()
        return False


@pytest.fixture
def calls() -> Iterator[Calls]:
    calls = Calls()
    yield calls
    os.close(calls.reader)
    os.close(calls.writer)


def run(calls: Calls, patience: float, turns: int) -> list[str]:
    """Return what the loop asked for in so many turns."""
    loop = Loop(RateLimitedLog("test", 20), patience)

    def turned() -> None:
        if calls.made.count("turn") == turns:
            loop.stop(0)

    calls.turned = turned
    loop.add(calls.reader, select.EPOLLIN, lambda mask: calls.hear(), lambda error: loop.stop(1))
    try:
        assert loop.run(calls) == 0
    finally:
        loop.close()
    return calls.made


@pytest.fixture(autouse=True)
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


def test_after_a_short_sleep_it_looks_before_it_sleeps(calls: Calls) -> None:
    looks = iter([False, False, True])
    calls.stir = lambda: next(looks)
    assert run(calls, 60, 2) == ["rest", "turn", "look", "turn"]


def test_it_finds_events_by_looking_too(calls: Calls) -> None:
    def stir() -> bool:
        calls.event()
        return False

    calls.stir = stir
    assert run(calls, 60, 3) == ["rest", "turn", "look", "turn", "look", "turn"]


def test_after_it_looked_in_vain_it_sleeps_some_times(calls: Calls) -> None:
    made = run(calls, 0.2, POLL_BACKOFF + 2)
    assert made == ["rest", "turn", "look", *["rest", "turn"] * POLL_BACKOFF, "look", "rest", "turn"]


def test_a_long_sleep_is_followed_by_another(calls: Calls) -> None:
    assert run(calls, 1e-9, 4) == ["rest", "turn"] * 4


def test_in_bulk_it_sleeps(calls: Calls) -> None:
    calls.small = False
    assert run(calls, 60, 3) == ["rest", "turn"] * 3


def test_with_one_processor_it_sleeps(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert run(calls, 60, 3) == ["rest", "turn"] * 3

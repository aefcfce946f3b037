"""Test the single owner of children.  Tests run in separate processes: a reaper takes all of a process's children."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from caisson.agent.base.errors import ProcessExited
from caisson.agent.base.signals import Signals
from caisson.agent.model.reaper import Child, Reaper

ROOT = Path(__file__).resolve().parents[2]
Scenario = Callable[[Reaper], Coroutine[None, None, None]]


def alone(scenario: Scenario) -> Callable[[], None]:
    """Run a scenario in a fresh process, with a running reaper."""
    name = scenario.__name__
    code = f"from tests.component import test_reaper; test_reaper.play(test_reaper.SCENARIOS[{name!r}])"

    def test() -> None:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    test.__name__ = name
    SCENARIOS[name] = scenario
    return test


SCENARIOS: dict[str, Scenario] = {}


def play(scenario: Scenario) -> None:
    async def work() -> None:
        reaper = Reaper()
        with Signals(asyncio.get_running_loop()) as signals:
            reaper.start(signals)
            await asyncio.wait_for(scenario(reaper), 30)

    asyncio.run(work())


def spawn(script: str) -> int:
    return os.posix_spawn("/bin/sh", ["sh", "-c", script], os.environ)


async def is_reaped(pid: int) -> None:
    while Path(f"/proc/{pid}").exists():  # noqa: ASYNC110 - nobody else announces it
        await asyncio.sleep(0.001)


async def until_it_has_ended(child: Child) -> None:
    """Continue a process that stops itself: repeatedly, since it may not have stopped yet."""
    while child.status is None:
        child.signal(signal.SIGCONT)
        await asyncio.sleep(0.001)


@alone
async def test_statuses(reaper: Reaper) -> None:
    wanted = {"exit 0": 0, "exit 7": 7, "exit 255": 255, "kill -9 $$": 137, "kill -TERM $$": 143, "kill -SEGV $$": 139}
    children = [reaper.claim(spawn(script)) for script in wanted]
    assert await asyncio.gather(*(child.wait() for child in children)) == list(wanted.values())


@alone
async def test_any_number_of_waiters_before_and_after(reaper: Reaper) -> None:
    child = reaper.claim(spawn("kill -STOP $$; exit 3"))
    waiters = [asyncio.ensure_future(child.wait()) for _ in range(10)]
    await asyncio.sleep(0)
    waiters[0].cancel()
    await asyncio.gather(waiters[0], return_exceptions=True)
    assert child.status is None
    await until_it_has_ended(child)
    assert await asyncio.gather(*waiters[1:]) == [3] * 9
    assert await child.wait() == 3


@alone
async def test_a_status_that_comes_before_its_claim_is_kept_while_somebody_expects_it(reaper: Reaper) -> None:
    with reaper.expecting():
        pid = spawn("exit 5")
        await is_reaped(pid)
        assert await reaper.claim(pid).wait() == 5


@alone
async def test_unclaimed_statuses_go_with_the_last_who_expects(reaper: Reaper) -> None:
    with reaper.expecting():
        with reaper.expecting():
            await is_reaped(spawn("exit 5"))
        assert len(reaper._unclaimed) == 1
    assert reaper._unclaimed == {}
    await is_reaped(spawn("exit 6"))
    assert reaper._unclaimed == {}


@alone
async def test_a_kept_status_is_not_given_to_a_later_process_of_the_same_number(reaper: Reaper) -> None:
    with reaper.expecting():
        pid = spawn("kill -STOP $$; exit 8")
        reaper._unclaimed[pid] = 1  # as if an orphan with this pid had exited before
        child = reaper.claim(pid)
        assert child.status is None
        await until_it_has_ended(child)
        assert child.status == 8


@alone
async def test_orphans_are_reaped_and_nobody_is_told(reaper: Reaper) -> None:
    child = reaper.claim(spawn("(sh -c 'echo $$ > /proc/self/fd/1' & wait; sleep 0.2 & exit 0)"))
    assert await child.wait() == 0
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while children.read_text():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


@alone
async def test_a_thousand_that_end_at_once(reaper: Reaper) -> None:
    children = []
    for number in range(1000):
        with reaper.expecting():
            pid = spawn("exit 0")
            if number % 2:
                await asyncio.sleep(0)  # it may be reaped before it is claimed
            children.append(reaper.claim(pid))
    assert await asyncio.gather(*(child.wait() for child in children)) == [0] * 1000
    assert reaper._children == {}


@alone
async def test_signals_go_to_who_was_claimed_and_to_nobody_after_its_end(reaper: Reaper) -> None:
    child = reaper.claim(spawn("exec sleep 1000"))
    child.signal(signal.SIGTERM)
    assert await child.wait() == 143
    for number in (0, signal.SIGKILL):
        with pytest.raises(ProcessExited):
            child.signal(number)


def test_callbacks_are_for_the_end_that_comes_while_they_are_registered() -> None:
    child, told = Child(1), []
    with child.on_exit(lambda: told.append("left before")):
        pass
    with child.on_exit(lambda: told.append("one")), child.on_exit(lambda: told.append("two")):
        child._end(0)
    assert told == ["one", "two"]

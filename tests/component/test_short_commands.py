"""Test that commands of one call or none import little, and that coroutines of calls need no event loop."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caisson.agent.client.connection import call_sync
from caisson.agent.client.errors import AgentGone
from caisson.agent.rpc.ttrpc.blocking import take
from caisson.image.vm.hotplug import resources
from tests.component.test_client_execute import ok, pretended, status

#: Modules that take as long to execute as the rest of such a command.
EVENT_LOOP, PROTOBUF, STARTER = "asyncio.base_events", "google.protobuf", "caisson.image.vm.machine"

#: One call, as entry.py runs commands: what it defers stays deferred.
CALL = """
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from caisson.agent.base.lazyimport import LazyImporter
from caisson.commands.entry import DEFERRED
sys.meta_path.insert(0, LazyImporter(DEFERRED))
from caisson.agent.client.connection import call_sync
machine = SimpleNamespace(agent_socket=Path(sys.argv[1]))
print(call_sync(machine, lambda agent: agent.container("box").init().wait()))
print(*sorted(sys.modules), sep="\\n", file=open(sys.argv[2], "w"))
"""


def imported(*words: str, run: Path) -> set[str]:
    """Return the modules that a command has executed."""
    command = (sys.executable, "-X", "importtime", "-m", "caisson.commands.entry", *words)
    done = subprocess.run(command, env=os.environ | {"CAISSON_RUN": str(run)}, stderr=subprocess.PIPE, timeout=60)
    lines = done.stderr.decode().splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


@pytest.mark.parametrize(
    ("words", "forbidden"),
    [
        (("list-vms",), {EVENT_LOOP, PROTOBUF, STARTER}),
        (("cp", "a", "box:/a"), {EVENT_LOOP, PROTOBUF, STARTER}),
        (("shell",), {EVENT_LOOP, PROTOBUF, STARTER}),
        (("stop-vm", "--all"), {EVENT_LOOP, STARTER}),
        (("ps",), {EVENT_LOOP, STARTER}),
        (("rm", "box"), {EVENT_LOOP, STARTER}),
    ],
)
def test_short_commands_import_little(tmp_path: Path, words: tuple[str, ...], forbidden: set[str]) -> None:
    found = imported(*words, run=tmp_path)
    assert "caisson.image.vm.running" in found
    assert not found & forbidden


def test_a_call_needs_no_event_loop(tmp_path: Path) -> None:
    with pretended(tmp_path, WaitProcess=status(7)) as (_, words):
        done = subprocess.run([words[0], "-c", CALL, *words[3:]], stdout=subprocess.PIPE, check=True, timeout=60)
    assert done.stdout == b"7\n"
    assert EVENT_LOOP not in (tmp_path / "modules").read_text().split()


def test_all_vms_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose QEMU does not answer delays the list by its timeout, and ten do not by ten."""
    everybody = threading.Barrier(4, timeout=30)

    def memory_now(vm: Any) -> int:
        everybody.wait()
        if vm.name == "3":
            raise OSError("gone")
        return int(vm.name)

    monkeypatch.setattr(resources, "memory_now", memory_now)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    vms: list[Any] = [SimpleNamespace(name=str(number)) for number in range(4)]
    assert resources.memory_of_all(vms) == {"0": 0, "1": 1, "2": 2, "3": None}


def machine(tmp_path: Path) -> Any:
    return SimpleNamespace(agent_socket=tmp_path / "agent.sock")


def test_several_calls_over_one_connection(tmp_path: Path) -> None:
    async def both(agent: Any) -> int:
        await agent.container("box").pause()
        return int(await agent.container("box").init().wait())

    with pretended(tmp_path, PauseContainer=ok, WaitProcess=status(3)) as (agent, _):
        assert call_sync(machine(tmp_path), both) == 3
        assert [method for method, _ in agent.asked] == ["PauseContainer", "WaitProcess"]


def test_errors_of_calls_are_the_same_without_a_loop(tmp_path: Path) -> None:
    with pytest.raises(AgentGone, match="no such file or directory"):
        call_sync(machine(tmp_path), lambda agent: agent.version())


def test_whoever_awaits_something_else_is_told(tmp_path: Path) -> None:
    async def sleep(_: object) -> None:
        future: asyncio.Future[None] = asyncio.Future(loop=SimpleNamespace(get_debug=lambda: False))  # type: ignore[arg-type]
        await future

    with pytest.raises(RuntimeError, match="awaits something else than a call"):
        call_sync(machine(tmp_path), sleep)


def test_a_signal_just_before_a_wait_does_not_make_it_endless() -> None:
    """`take` returns to the interpreter, which runs handlers, even if nothing wakes it."""

    class Queue:
        waits = 0

        def get(self, timeout: float) -> str:
            from _queue import Empty

            self.waits += 1
            if self.waits < 3:
                raise Empty
            return "item"

    queue: Any = Queue()
    assert take(queue) == "item" and queue.waits == 3

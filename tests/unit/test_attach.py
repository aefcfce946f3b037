"""Test connecting a process to the caller's descriptors, with a fake process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.client import AgentError, OutputError, StatusCode, attach, logs
from tests.support.poll import until


class FakeProcess:
    """Echoes its input on stdout, prints `oops` on stderr, and exits with status 9 at EOF."""

    terminal = False

    def __init__(self, endless: bool = False) -> None:
        self.endless = endless
        self.input: asyncio.Queue[bytes] = asyncio.Queue()
        self.signals: list[int] = []

    async def write(self, data: bytes) -> None:
        if self.endless:
            raise AgentError(StatusCode.UNKNOWN, "write |1: broken pipe")
        await self.input.put(data)

    async def close_stdin(self) -> None:
        await self.input.put(b"")

    async def stdout(self) -> AsyncIterator[bytes]:
        while self.endless:
            yield b"y\n" * 50_000
        while data := await self.input.get():
            yield data

    async def stderr(self) -> AsyncIterator[bytes]:
        yield b"oops\n"

    async def signal(self, number: int) -> None:
        self.signals.append(number)

    async def wait(self) -> int:
        return 9


def join(process: Any, stdin: int, stdout: int, stderr: int) -> int:
    return asyncio.run(asyncio.wait_for(attach(process, stdin=stdin, stdout=stdout, stderr=stderr), 60))


def test_streams_and_status(tmp_path: Path) -> None:
    data = os.urandom(5_000_000)
    (tmp_path / "in").write_bytes(data)
    with (
        (tmp_path / "in").open("rb") as source,
        (tmp_path / "out").open("wb") as out,
        (tmp_path / "err").open("wb") as err,
    ):
        assert join(FakeProcess(), source.fileno(), out.fileno(), err.fileno()) == 9
    assert (tmp_path / "out").read_bytes() == data
    assert (tmp_path / "err").read_bytes() == b"oops\n"


def test_stdin_that_never_ends_does_not_hold_the_end(tmp_path: Path) -> None:
    class Ends(FakeProcess):
        async def stdout(self) -> AsyncIterator[bytes]:
            yield b"done\n"

    reading, writing = os.pipe()
    try:
        with (tmp_path / "out").open("wb") as out:
            assert join(Ends(), reading, out.fileno(), out.fileno()) == 9
    finally:
        os.close(writing)
        os.close(reading)


def test_a_reader_that_leaves_is_a_broken_pipe(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = FakeProcess(endless=True)
    try:
        with open(os.devnull) as source, (tmp_path / "err").open("wb") as err:  # noqa: PTH123
            assert join(process, source.fileno(), writing, err.fileno()) == 128 + signal.SIGPIPE
    finally:
        os.close(writing)
    assert process.signals == [signal.SIGPIPE]


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    process = FakeProcess(endless=True)
    with open(os.devnull) as source, open("/dev/full", "wb") as out, (tmp_path / "err").open("wb") as err:  # noqa: PTH123
        with pytest.raises(OutputError, match="No space left"):
            join(process, source.fileno(), out.fileno(), err.fileno())
    assert process.signals == [signal.SIGPIPE]


@pytest.mark.parametrize(
    ("presses", "ends_with", "status"),
    [
        (1, 128 + signal.SIGKILL, 128 + signal.SIGINT),  # the agent has killed what SIGINT does not reach
        (1, 3, 3),
        (3, 128 + signal.SIGKILL, 128 + signal.SIGKILL),
    ],
)
def test_ctrl_c_goes_to_the_program_and_the_third_one_kills_it(presses: int, ends_with: int, status: int) -> None:
    class Interrupted(FakeProcess):
        def heard(self, count: int) -> bool:
            return len(self.signals) == count

        async def stdout(self) -> AsyncIterator[bytes]:
            for number in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
                await until(partial(self.heard, number + 1), "it is passed on")
            yield b""

        async def wait(self) -> int:
            return ends_with

    process = Interrupted()
    with open(os.devnull) as source, open(os.devnull, "wb") as out:  # noqa: PTH123
        assert join(process, source.fileno(), out.fileno(), out.fileno()) == status
    assert process.signals == ([signal.SIGINT] if presses == 1 else [signal.SIGINT, signal.SIGINT, signal.SIGKILL])


@pytest.mark.parametrize(
    ("typed", "written", "detached"),
    [
        ([b"a\x10\x11b"], b"a", True),
        ([b"a\x10", b"\x11", b"b"], b"a", True),
        ([b"\x10", b"x", b"\x11"], b"\x10x\x11", False),
        ([b"\x10\x10\x11"], b"\x10", True),
    ],
)
def test_ctrl_p_ctrl_q_detaches(
    monkeypatch: pytest.MonkeyPatch, typed: list[bytes], written: bytes, detached: bool
) -> None:
    class Typed(FakeProcess):
        taken = b""

        async def write(self, data: bytes) -> None:
            self.taken += data

    async def keys(_: int) -> AsyncIterator[bytes]:
        for data in typed:
            yield data

    async def work() -> tuple[bytes, bool]:
        process: Any = Typed()
        left = asyncio.Event()
        await logs._feed(process, True, left.set)
        return process.taken, left.is_set()

    monkeypatch.setattr(logs, "read", keys)
    assert asyncio.run(work()) == (written, detached)

"""Test that terminal input reaches the program byte for byte, with any keys and read sizes; and resizes in order."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import random
import select
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from caisson.agent.client import logs
from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata3 import agent_pb2
from tests.component.test_client_execute import Agent, ok, pretended

COMMAND = """
import sys
from pathlib import Path
from types import SimpleNamespace
from caisson.agent.client.execute import execute
sys.exit(execute(SimpleNamespace(agent_socket=Path(sys.argv[1]), directory=Path("/")), "box", ["x"], terminal=True))
"""

#: Control characters that a terminal in cooked mode would interpret, bytes that are not UTF-8, and key sequences.
KEYS = [bytes([number]) for number in range(256)] + [
    b"\x1b[A", b"\x1b[1;5C", b"\x1b]0;title\x07", b"\x1b[200~pasted\nlines\x1b[201~", b"\xc3", b"\xff\xfe",
    "€".encode(),
    b"\x03\x03", b"\x1a", b"\x1c", b"\x04", b"\x11\x13", b"\x10\x11", b"\r\n", bytes(300),
]  # fmt: skip


def resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def input_of(agent: Agent) -> bytes:
    with agent.seen:
        asked = [payload for method, payload in agent.asked if method == "WriteStdin"]
    return b"".join(agent_pb2.WriteStreamRequest.FromString(one).data for one in asked)


def test_all_keys_and_a_burst_of_sizes_reach_the_program(tmp_path: Path) -> None:
    chance, ended = random.Random(5), threading.Event()
    typed = b"".join(chance.sample(KEYS, len(KEYS)) * 3)

    def read(_: bytes) -> bytes:
        assert ended.wait(60)
        return b""

    with pretended(tmp_path, ReadStdout=read, WriteStdin=ok, TtyWinResize=ok) as (agent, words):
        leader, follower = pty.openpty()
        resize(leader, 37, 111)
        before = termios.tcgetattr(follower)
        with subprocess.Popen(
            [sys.executable, "-c", COMMAND, *words[3:]], stdin=follower, stdout=follower, stderr=follower,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        ) as command:  # fmt: skip
            try:
                (started,) = agent.wait_for("ExecProcess")
                document = json.loads(caisson_pb2.ExecProcessRequest.FromString(started).process)
                assert document["consoleSize"] == {"height": 37, "width": 111}
                agent.wait_for("ReadStdout")  # in raw mode by now
                left = typed
                while left:
                    count = chance.randrange(1, 40)
                    os.write(leader, left[:count])
                    left = left[count:]
                    resize(leader, chance.randrange(1, 200), chance.randrange(1, 200))
                    if select.select([leader], [], [], 0)[0]:
                        raise AssertionError(f"echoed: {os.read(leader, 1000)!r}")
                resize(leader, 41, 137)
                with agent.seen:
                    assert agent.seen.wait_for(lambda: len(input_of(agent)) >= len(typed), 20), input_of(agent)
                    assert agent.seen.wait_for(lambda: sizes(agent)[-1:] == [(41, 137)], 20), sizes(agent)
                assert input_of(agent) == typed
            finally:
                ended.set()
            assert command.wait(60) == 9
        assert termios.tcgetattr(follower) == before
        os.close(leader)
        os.close(follower)


def sizes(agent: Agent) -> list[tuple[int, int]]:
    asked = [payload for method, payload in agent.asked if method == "TtyWinResize"]
    found = [agent_pb2.TtyWinResizeRequest.FromString(one) for one in asked]
    return [(one.row, one.column) for one in found]


@given(
    st.lists(st.lists(st.sampled_from([b"\x10", b"\x11", b"a", b"\0", b"\xff"]), min_size=1, max_size=4).map(b"".join))
)
@example([b"\x10", b"\x11"])
@example([b"\x10"])
@example([b"\x10", b"\x10", b"\x11"])
def test_the_detach_keys_end_the_input_however_reads_cut_them(pieces: list[bytes]) -> None:
    """All input before them reaches the program, and nothing after; without them all of it."""

    class Process:
        taken = b""

        async def write(self, data: bytes) -> None:
            self.taken += data

    async def read(_: int) -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    process: Any = Process()
    detached: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "read", read)
        asyncio.run(logs._feed(process, True, lambda: detached.append(True)))
    before, keys, _ = b"".join(pieces).partition(logs.DETACH)
    assert (process.taken, detached) == (before, [True] if keys else [])

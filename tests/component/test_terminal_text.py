"""Test what a command prints about a guest, on a terminal and to a file."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from caisson.commands import streams
streams.write_any_text()
streams.filter_terminals()
print("name\\x1b]0;title\\x07 \\x9b2J end")
print("said \\x1b[2J", file=sys.stderr)
write = streams.console_writer()
write(b"\\x1b[31mred\\x1b[0m \\x1b")
write(b"[2Jgone\\n")
"""


#: Prints what was recorded of a container's output.
LOGS = """
import asyncio, sys
from caisson.agent.client import logs
from caisson.proto.caisson import caisson_pb2
Entry, Answer = caisson_pb2.ReadLogResponse.Entry, caisson_pb2.ReadLogResponse
class Guest:
    async def ReadLog(self, request):
        pieces = [b"\\x1b[31mred\\x1b", b"[0m \\x1b]0;title\\x07 \\x9b2J end", b"\\x1b"]
        entries = [Entry(number=n, stream=int(sys.argv[1]), data=d) for n, d in enumerate(pieces) if n >= request.begin]
        return Answer(entries=entries, ended=True)
class Agent:
    guest = Guest()
asyncio.run(logs.show(Agent(), "box", tail=eval(sys.argv[2])))
"""


def on_a_terminal(stream: str, program: str = PROGRAM, *words: str) -> bytes:
    """Return what the program writes to a stream that is a terminal."""
    leader, follower = pty.openpty()
    with os.fdopen(leader, "rb", buffering=0) as reading:
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | {stream: follower}
        started = subprocess.Popen([sys.executable, "-c", program, *words], **streams)  # type: ignore[call-overload]
        os.close(follower)
        said = b""
        while True:
            try:
                piece = reading.read(4096)
            except OSError:  # EIO: the last descriptor of the other end was closed
                break
            if not piece:
                break
            said += piece
        assert started.wait(30) == 0
    return said


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_escape_sequences_do_not_reach_a_terminal(stream: str) -> None:
    said = on_a_terminal(stream)
    assert b"\x1b" not in said
    assert b"\xc2\x9b" not in said
    assert b"\x07" not in said
    assert (b"end" in said and b"red gone" in said) if stream == "stdout" else b"said" in said


@pytest.mark.parametrize("tail", ["None", "5"])
@pytest.mark.parametrize(("stream", "number"), [("stdout", "1"), ("stderr", "2")])
def test_the_output_of_a_container_is_shown_later_without_its_controls(stream: str, number: str, tail: str) -> None:
    said = on_a_terminal(stream, LOGS, number, tail)
    assert b"\x1b" not in said and b"\x07" not in said and b"red" in said and b"end" in said
    done = subprocess.run([sys.executable, "-c", LOGS, number, tail], capture_output=True, timeout=30, check=True)
    assert (done.stdout + done.stderr).startswith(b"\x1b[31mred\x1b[0m")


def test_a_file_gets_every_byte() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, timeout=30, check=True)
    assert b"\x1b[31mred\x1b[0m \x1b[2Jgone" in done.stdout

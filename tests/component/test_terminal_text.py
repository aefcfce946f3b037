"""What a command shows of a guest on a terminal, and in a file."""

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


def on_a_terminal(stream: str) -> bytes:
    """Return what the program writes to a stream that is a terminal."""
    leader, follower = pty.openpty()
    with os.fdopen(leader, "rb", buffering=0) as reading:
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | {stream: follower}
        program = subprocess.Popen([sys.executable, "-c", PROGRAM], **streams)  # type: ignore[call-overload]
        os.close(follower)
        said = b""
        while True:
            try:
                piece = reading.read(4096)
            except OSError:  # EIO: the last end of it is closed
                break
            if not piece:
                break
            said += piece
        assert program.wait(30) == 0
    return said


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_escape_sequences_do_not_reach_a_terminal(stream: str) -> None:
    said = on_a_terminal(stream)
    assert b"\x1b" not in said
    assert b"\xc2\x9b" not in said
    assert b"\x07" not in said
    assert (b"end" in said and b"red gone" in said) if stream == "stdout" else b"said" in said


def test_a_file_gets_every_byte() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, timeout=30, check=True)
    assert b"\x1b[31mred\x1b[0m \x1b[2Jgone" in done.stdout

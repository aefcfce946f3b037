"""Make the standard streams safe to use, whatever they were started with."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable

STANDARD = (0, 1, 2)


def occupy_standard_descriptors() -> None:
    """Open /dev/null in place of standard streams that are closed, before another file gets their number."""
    for number in STANDARD:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(number, True)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def write_any_text() -> None:
    """Let stdout and stderr take any text: names that are not UTF-8 as they are, and "?" for what a locale lacks."""
    codecs.register_error("caisson", _encode)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="caisson")


def _encode(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    escaped = (bytes([ord(one) - 0xDC00]) if 0xDC80 <= ord(one) <= 0xDCFF else b"?" for one in letters)
    return b"".join(escaped), error.end


def flush() -> str:
    """Write what is still in stdout's buffer; returns why that failed, or nothing.  Raises BrokenPipeError."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up_stdout()
        return str(error.strerror)
    return ""


def give_up_stdout() -> None:
    """Nobody reads stdout any more: what is still in its buffer must not fail at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def info(line: str) -> None:
    """Tell the user something, on stderr."""
    print(f"caisson: {line}", file=sys.stderr, flush=True)


def reporter(verbose: bool) -> Callable[[str], None]:
    """Progress goes to a terminal, or where it was asked for: a command's stderr is the program's alone."""
    return info if verbose or sys.stderr.isatty() else lambda line: None


def write_console(data: bytes) -> None:
    """Write a guest's output as it comes."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()

"""Make the standard streams safe to use, however the program was started."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Callable

from caisson.commands.declare import WRONG_USAGE
from caisson.commands.parse import CommandLineError
from caisson.proto.foreign_text import TerminalFilter, one_line, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from typing import Any

STANDARD = (0, 1, 2)


def occupy_standard_descriptors() -> None:
    """Open /dev/null in place of closed standard streams, before another file gets their numbers."""
    for number in STANDARD:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
            os.set_inheritable(number, True)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def write_any_text() -> None:
    """Make stdout and stderr accept any text: names that are not UTF-8 unchanged, and "?" for what a locale lacks."""
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


def flush() -> OSError | None:
    """Write what is still in stdout's buffer; returns why that failed, if it did.  Raises BrokenPipeError."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up_stdout()
        return error
    return None


def give_up_stdout() -> None:
    """Drop buffered output for a stdout without readers: it must not fail at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def check_writable(option: str, path: Path) -> None:
    """Check whether a file can be written before there is anything to write; does not create it.

    Raises CommandLineError.
    """
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        text = f"{option} {path}: cannot be written: {error.strerror}; name another file"
        raise CommandLineError(text, WRONG_USAGE) from error
    if not existed:
        path.unlink()


def info(line: str) -> None:
    """Print a message for the user on stderr."""
    print(f"caisson: {line}", file=sys.stderr, flush=True)


def reporter(verbose: bool) -> Callable[[str], None]:
    """Report progress on a terminal, or on request: otherwise a command's stderr belongs to the program."""
    return info if verbose or sys.stderr.isatty() else lambda line: None


class _TerminalText(io.TextIOWrapper):
    """A terminal that only gets text: names, messages and logs come from a guest, and may contain escape sequences."""

    def write(self, text: str) -> int:
        super().write(printable(text))
        return len(text)


def filter_terminals() -> None:
    """Keep control characters from stdout and stderr if they are terminals.  Bytes written to the descriptors pass."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.isatty():
            encoding, errors = stream.encoding, stream.errors
            stream.flush()
            text = _TerminalText(stream.detach(), encoding=encoding, errors=errors, line_buffering=True)
            setattr(sys, name, text)
            setattr(sys, f"__{name}__", text)


def console_writer() -> Callable[[bytes], None]:
    """Return a writer of a guest's output to stdout: unchanged, or without control characters on a terminal."""
    filtered = TerminalFilter() if sys.stdout.isatty() else None

    def write(data: bytes) -> None:
        sys.stdout.buffer.write(filtered(data) if filtered else data)
        sys.stdout.buffer.flush()

    return write


def print_table(columns: Sequence[str], data: object, rows: Iterable[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print data as JSON, or rows as a table, each on one line."""
    if as_json:
        import json  # late, as below: a short command has no time for what it does not use

        print(json.dumps(data, indent=2))
        return
    table = [
        columns,
        *(["-" if row.get(column) is None else one_line(str(row[column])) for column in columns] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())

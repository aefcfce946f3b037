"""The caller's side of a program in a container: streams, signals, the terminal, and the --user syntax."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
from collections.abc import Iterator, Mapping, Sequence

from caisson.agent.client.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: The default container of a VM.
DEFAULT = "default"

#: Bytes that are copied at once.  A pipe holds 64 KiB by default, and at most this unless root has made it.
CHUNK = 1 << 20

#: Bytes of input that are read and sent in one call: a message holds 4 MiB.
INPUT_CHUNK = 2 << 20

#: Bytes of output requested in one call: what fits into a message.  A call costs as much as moving half a MiB.
OUTPUT_CHUNK = 63 << 16

#: Signals that are passed on to the process.
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

#: Signals to stop, and how many of them before the process is killed.
STOPS = (signal.SIGINT, signal.SIGTERM)
MAX_STOPS = 3

#: The default user of a program.
ROOT: Mapping[str, Any] = {"uid": 0, "gid": 0}

#: Characters of user and group names, besides letters and digits (useradd(8)).
NAME_SIGNS = "_.$-"

#: The default search path of a program.
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class OutputError(Exception):
    """Output cannot be written, for example to a full disk."""


def write_all(target: int, data: bytes | memoryview) -> None:
    """Write all of it to a descriptor.  Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


def output_error(error: OSError) -> OutputError:
    """Return the error for output that cannot be written."""
    return OutputError(f"its output cannot be written: {error.strerror}")


@contextlib.contextmanager
def raw_terminal(terminal: int) -> Iterator[None]:
    """Put a terminal into raw mode for a block; a no-op on other files."""
    if not os.isatty(terminal):
        yield
        return
    import tty

    before = termios.tcgetattr(terminal)
    tty.setraw(terminal)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def status_of(status: int, stops: Sequence[int]) -> int:
    """Return the status of a process after signals to stop it: the agent may have sent SIGKILL instead of the last."""
    return 128 + stops[-1] if 0 < len(stops) < MAX_STOPS and status == 128 + signal.SIGKILL else status


def terminal_size() -> tuple[int, int] | None:
    """Return the rows and columns of the terminal at standard input; None if it is not one, or has no size."""
    with contextlib.suppress(OSError, ValueError):
        size = os.get_terminal_size(0)
        if size.lines and size.columns:
            return size.lines, size.columns
    return None


def console_size(terminal: bool) -> dict[str, Any]:
    """Return ``consoleSize`` of a process on a terminal: a program may query it before a later update arrives."""
    size = terminal_size() if terminal else None
    return {} if size is None else {"consoleSize": {"height": size[0], "width": size[1]}}


def terminal_env(terminal: bool) -> list[str]:
    """Return TERM for a program on a terminal, the caller's own."""
    return [f"TERM={os.environ.get('TERM', 'xterm')}"] if terminal else []


def user_document(text: str) -> Mapping[str, Any]:
    """Parse USER[:GROUP] into a `user` of the specification; its names and numbers are looked up in the container.

    Raises UsageError.
    """
    for one in text.split(":", 1):
        plain = one.translate({ord(sign): None for sign in NAME_SIGNS})
        if not plain.isascii() or not plain.isalnum() or one[0] in "-.$":
            raise UsageError(f"--user {text!r}: is not a user; give USER or USER:GROUP, by name or number")
        if one.isdecimal() and int(one) >= (1 << 32) - 1:
            raise UsageError(f"--user {text!r}: {one} is out of range; ids are 0 to {(1 << 32) - 2}")
    return ROOT if text == "0" else {"username": text}

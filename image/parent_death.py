"""Kill a process's children when it dies, even if it is killed and cannot do so itself.

Either a command with all its children, in its own session, or the caller's own process group, with a cleanup: a shell
waits for end of file on a pipe whose other end only this process holds.  (For a single process, vm/sandbox.py sets the
kernel's parent-death signal before exec.)
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence

#: Runs "$@" as a session and kills that session at the end of file on $1.
KILL_WITH_PARENT = """
{ read -r _; kill -KILL 0; } <"$1" >/dev/null 2>&1 &
shift
"$@"
status=$?
kill -KILL $!
exit $status
"""

#: Waits for end of file on stdin, kills the process group $1, and runs the cleanup script $2 with what follows.  A line
#: `done` before that: there is nothing to do.
KILL_AND_CLEAN_UP = """
IFS= read -r word
[ "$word" = done ] && exit
kill -KILL "-$1"
script=$2
shift 2
exec /bin/sh -c "$script" caisson-janitor "$@"
"""


@contextlib.contextmanager
def session_killed_with_parent(argv: Sequence[str]) -> Iterator[tuple[list[str], int]]:
    """Wrap a command so that it is killed, with all its children, when the block is left or this process dies.

    Yields the command and the descriptor to pass to it; start it with ``start_new_session=True``.
    """
    reading, writing = os.pipe()
    try:
        yield ["/bin/sh", "-c", KILL_WITH_PARENT, argv[0], f"/dev/fd/{reading}", *argv], reading
    finally:
        os.close(reading)
        os.close(writing)


@contextlib.contextmanager
def cleaned_up_if_killed(script: str, arguments: Sequence[str]) -> Iterator[None]:
    """Kill this process's group and run a shell script if this process dies before the block is left."""
    reading, writing = os.pipe()
    quiet = subprocess.DEVNULL
    argv = ["/bin/sh", "-c", KILL_AND_CLEAN_UP, "caisson-janitor", str(os.getpgrp()), script, *arguments]
    shell = subprocess.Popen(argv, stdin=reading, stdout=quiet, stderr=quiet, cwd="/", start_new_session=True)
    os.close(reading)
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            os.write(writing, b"done\n")
        os.close(writing)
        shell.wait()

"""Run other programs to completion, in a minimal environment, killed with this process."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from caisson.image.errors import ImageError
from caisson.image.parent_death import session_killed_with_parent
from caisson.image.programs import package_of, search_path

#: Bytes of a log's end in which to look for an error.
MAX_TAIL = 64 << 10

#: Environment variables to pass on: paths, and network access.
INHERITED = re.compile(
    r"PATH|HOME|TMPDIR|XDG_\w+_HOME|PIP_\w+"
    r"|(?i:https?|ftp|all|no)_(?i:proxy)|(?:REQUESTS|SSL|CURL)_C\w+"
)


class MissingProgram(ImageError):
    """A program is not installed."""

    def __init__(self, program: str) -> None:
        super().__init__(f"{program}: is not installed; run: sudo apt-get install {package_of(program)}")
        self.program = program


class CommandFailed(ImageError):
    """A program failed: its command line, status and last output."""

    def __init__(self, argv: Sequence[str], status: int, output: str) -> None:
        words = "\n".join(output.strip().splitlines()[-15:])
        super().__init__(f"`{shlex.join(argv)}`: exited with status {status}" + (f":\n{words}" if words else ""))
        self.argv = list(argv)
        self.status = status


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    log: Path | None = None,
) -> bytes:
    """Run a program to completion and return its output, unless that goes to a ``log``.

    ``env`` is added to a minimal environment.

    It and all its children are killed with this process, even if that is killed.  Raises MissingProgram, or
    CommandFailed with its stderr; the status is 128+n if signal n killed it.
    """
    words = [os.fspath(word) for word in argv]
    settings = {name: value for name, value in os.environ.items() if INHERITED.fullmatch(name)}
    settings |= {"PATH": search_path(), "LC_ALL": "C.UTF-8", **(env or {})}
    if shutil.which(words[0], path=settings["PATH"]) is None:
        raise MissingProgram(words[0])
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("w+b")) if log else None
        command, fd = stack.enter_context(session_killed_with_parent(words))
        done = subprocess.run(
            command, cwd=cwd, env=settings, input=stdin, pass_fds=[fd], start_new_session=True,
            stdout=output or subprocess.PIPE, stderr=output or subprocess.PIPE,
        )  # fmt: skip
        if done.returncode != 0:
            said = _end_of(output) if output else done.stderr or done.stdout
            raise CommandFailed(words, done.returncode, said.decode(errors="replace"))
    return done.stdout or b""


def _end_of(log: IO[bytes]) -> bytes:
    log.seek(max(0, log.seek(0, os.SEEK_END) - MAX_TAIL))
    return log.read(MAX_TAIL)


def remove_in_background(*paths: Path) -> None:
    """Remove directories and files in the background, even after this process has exited."""
    # Twice: a killed process may still be writing.
    script = 'for path; do rm -rf -- "$path" || { sleep 1; rm -rf -- "$path"; }; done >/dev/null 2>&1 &'
    subprocess.run(["/bin/sh", "-c", script, "sh", *paths], start_new_session=True, check=False)

"""Programs of the guest's own that the agent runs to their end: packet filters have no other interface.

Their streams are files in memory (memfd_create(2)): nothing is to be read while they run, and nothing can hang on a
full pipe.
"""

from __future__ import annotations

import asyncio
import os
import signal

from caisson.agent.base.errors import SystemCallFailed, Timeout, Unsupported
from caisson.agent.base.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from caisson.agent.model.reaper import Reaper

#: Where programs are, in the order in which they are looked for.
DIRECTORIES = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")
ENVIRONMENT = {"PATH": ":".join(DIRECTORIES)}

#: Seconds that a program may take, and bytes of its output that are of interest.
PROGRAM_TIMEOUT = 30.0
MAX_OUTPUT = 3 << 20


class Done(Record):
    """A program that has ended; `status` is 128 + n for one that signal n ended."""

    status: int
    stdout: bytes
    stderr: bytes


async def run(reaper: Reaper, name: str, *arguments: str, data: bytes = b"") -> Done:
    """Run a program with ``data`` as its standard input.

    Raises Unsupported where the image does not have it, Timeout, or SystemCallFailed.
    """
    path = next((path for path in (f"{place}/{name}" for place in DIRECTORIES) if os.access(path, os.X_OK)), None)
    if path is None:
        raise Unsupported(f"{name}: is not in this image; build one with it")
    streams = [os.memfd_create(stream, os.MFD_CLOEXEC) for stream in ("stdin", "stdout", "stderr")]
    try:
        with open(streams[0], "wb", closefd=False) as stdin:
            stdin.write(data)
        os.lseek(streams[0], 0, os.SEEK_SET)
        child = reaper.claim(_spawn(path, [name, *arguments], streams))
        try:
            status = await asyncio.wait_for(child.wait(), PROGRAM_TIMEOUT)
        except BaseException as error:
            if child.status is None:
                os.killpg(child.pid, signal.SIGKILL)
                await child.wait()
            if isinstance(error, TimeoutError):
                raise Timeout(f"{name}: was ended: it took more than {PROGRAM_TIMEOUT:g} s") from None
            raise
        return Done(status, *(os.pread(fd, MAX_OUTPUT, 0) for fd in streams[1:]))
    finally:
        for fd in streams:
            os.close(fd)


def _spawn(path: str, words: Sequence[str], streams: Sequence[int]) -> int:
    """Start a program, as the leader of its own session.  By posix_spawn: the agent has threads and must not fork."""
    try:
        return os.posix_spawn(
            path,
            list(words),
            ENVIRONMENT,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(streams)],
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),  # Python ignores them
        )
    except OSError as error:
        raise SystemCallFailed(f"{path}: {os.strerror(error.errno or 0).lower()}") from error

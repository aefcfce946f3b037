"""The guest's packet filter, by ip[6]tables-save(8) and ip[6]tables-restore(8), if the image has them.

The programs' streams are files in memory (memfd_create(2)): no reading is needed while one runs, and nothing can block
on a full pipe.
"""

from __future__ import annotations

import asyncio
import os
import signal

from caisson.agent.base.errors import SystemCallFailed, Timeout, Unsupported, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from caisson.agent.libcontainer.process.children import Children

#: Paths of the programs, in search order.
DIRECTORIES = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")
ENVIRONMENT = {"PATH": ":".join(DIRECTORIES)}

#: Timeout of a program in seconds, the part of it for waiting for another one's lock, and the maximum output in bytes.
PROGRAM_TIMEOUT = 30.0
LOCK_TIMEOUT = "5"
MAX_OUTPUT = 3 << 20


class PacketFilter:
    """Rules of IPv4 and IPv6."""

    def __init__(self, children: Children) -> None:
        self._children = children

    async def save(self, *, ipv6: bool) -> bytes:
        """Return all rules.  Raises Unsupported if the program is missing, SystemCallFailed, or Timeout."""
        return await self._run(f"{_program(ipv6)}-save")

    async def restore(self, rules: bytes, *, ipv6: bool) -> bytes:
        """Replace the rules of the tables that ``rules`` name; returns the program's output.  Raises as `save`."""
        return await self._run(f"{_program(ipv6)}-restore", "--wait", LOCK_TIMEOUT, data=rules)

    async def _run(self, name: str, *arguments: str, data: bytes = b"") -> bytes:
        path = next((path for path in (f"{place}/{name}" for place in DIRECTORIES) if os.access(path, os.X_OK)), None)
        if path is None:
            raise Unsupported(f"{name}: is not in this image; build one with it")
        streams = [os.memfd_create(stream, os.MFD_CLOEXEC) for stream in ("stdin", "stdout", "stderr")]
        try:
            with open(streams[0], "wb", closefd=False) as stdin:
                stdin.write(data)
            os.lseek(streams[0], 0, os.SEEK_SET)
            status = await self._wait(name, _spawn(path, [name, *arguments], streams))
            if status:
                said = " ".join(os.pread(streams[2], MAX_OUTPUT, 0).decode(errors="replace").split())
                raise SystemCallFailed(f"{name}: exit status {status}: {said}")
            return os.pread(streams[1], MAX_OUTPUT, 0)
        finally:
            for fd in streams:
                os.close(fd)

    async def _wait(self, name: str, pid: int) -> int:
        """Wait for a program; it is killed on timeout, or if its caller is cancelled."""
        child = self._children.claim(pid)
        waiting = asyncio.ensure_future(child.wait())
        try:
            return await asyncio.wait_for(asyncio.shield(waiting), PROGRAM_TIMEOUT)
        except BaseException as error:
            if not waiting.done():
                os.killpg(pid, signal.SIGKILL)
                await waiting
            if isinstance(error, TimeoutError):
                raise Timeout(f"{name}: was killed: it took more than {PROGRAM_TIMEOUT:g} s") from None
            raise


def _program(ipv6: bool) -> str:
    return "ip6tables" if ipv6 else "iptables"


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
        raise SystemCallFailed(f"{path}: {reason(error)}") from error

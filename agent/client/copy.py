"""Files and directories into a container and out of it.

Archives of tar(1) go through a process in the container: that way its mounts and links are what the container itself
sees, and nothing outside of it can be reached.  So the container needs `sh` and `tar`, as with `kubectl cp`.
"""

from __future__ import annotations

import asyncio
import os
import posixpath
import re
import signal
import tarfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from caisson.agent.client.attach import write_all
from caisson.agent.client.connection import CHUNK, Agent, AgentError, Container, Process, ProgramError
from caisson.agent.client.errors import UsageError
from caisson.agent.client.specs import PATH
from caisson.agent.client.unpack import unpack

#: A container's name and a path in it; what begins with "/" or "." is a path of the host's, whatever is in it.
PLACE = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*):(.+)", re.DOTALL)

#: What tar complains of is short, or of no use.
MAX_STDERR = 4096


@dataclass(frozen=True)
class Place:
    """Where a file is: ``container`` is empty for the host."""

    container: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Place:
        """CONTAINER:PATH, or a path of the host's.  Raises UsageError."""
        found = PLACE.fullmatch(text)
        if not text or text.endswith(":"):
            raise UsageError(f"{text!r} is neither a path nor CONTAINER:PATH")
        return cls(found[1], posixpath.join("/", found[2])) if found else cls("", text)


async def copy(agent: Agent, source: str, target: str) -> list[str]:
    """Copy a file or a directory between the host and a container, one of which is CONTAINER:PATH.

    Into a directory that exists, else under the target's name, as with cp(1).  Modes and times are kept; owners are
    root in the container, and the caller on the host.  Returns the names of what was left out: devices.
    Raises UsageError, AgentError.
    """
    from_, to = Place.parse(source), Place.parse(target)
    if bool(from_.container) == bool(to.container):
        raise UsageError("one of the two is a path in a container, CONTAINER:PATH, and the other one of the host's")
    try:
        if to.container:
            return await put(agent.container(to.container), Path(from_.path), to.path)
        return await get(agent.container(from_.container), from_.path, Path(to.path), to.path.endswith("/"))
    except ProgramError as error:
        raise UsageError(f"copying needs `sh` and `tar` in the container: {error}") from error


async def put(container: Container, source: Path, path: str) -> list[str]:
    """Copy from the host into a container; as `copy`."""
    if not source.exists() and not source.is_symlink():
        raise UsageError(f"{source}: No such file or directory")
    name = source.resolve().name if source.name in ("", "..") else source.name
    path, into = posixpath.normpath(path), path.endswith("/")
    if into or await _status(container, ["sh", "-c", '[ -d "$1" ]', "sh", path]) == 0:
        directory = path
    else:
        directory, name = posixpath.split(path)
    process = await _tar(container, "x", "-f", "-", "-C", directory)
    read_end, write_end = os.pipe()
    packing = asyncio.create_task(asyncio.to_thread(_pack, write_end, source, name))
    feeding = asyncio.create_task(_feed(process, read_end))
    async with _ending(feeding, packing):
        complaints = await _complaints(process)
        await feeding
        try:
            left_out = await packing
        except BrokenPipeError:  # tar has ended first: it says why
            left_out = []
        except OSError as error:
            raise UsageError(f"{error.filename or source}: {error.strerror}") from error
    if status := await process.wait():
        raise UsageError(complaints or f"tar ended with status {status}")
    return left_out


async def get(container: Container, path: str, target: Path, into: bool = False) -> list[str]:
    """Copy from a container to the host, with ``into`` certainly into a directory; as `copy`."""
    parent, name = posixpath.split(posixpath.normpath(path))
    old = name or "."
    if target.is_dir():
        directory, new = target, name
    elif into:
        raise UsageError(f"{target}: there is no such directory")
    else:
        directory, new = target.parent, target.name
    if not directory.is_dir():
        raise UsageError(f"{directory}: there is no such directory")
    process = await _tar(container, "c", "-f", "-", "-C", parent, f"./{name}")
    read_end, write_end = os.pipe()
    unpacking = asyncio.create_task(asyncio.to_thread(_unpack, read_end, directory, old, new or "."))
    draining = asyncio.create_task(_drain(process, write_end))
    async with _ending(draining, unpacking):
        complaints = await _complaints(process)
        await draining
        try:
            left_out = await unpacking
        except OSError as error:
            raise UsageError(f"{target}: {error.filename or ''}: {error.strerror or error}") from error
        except tarfile.TarError as error:
            status = await process.wait()
            raise UsageError(
                complaints if status and complaints else f"what the container sent is no archive: {error}"
            ) from error
    if status := await process.wait():
        raise UsageError(complaints or f"tar ended with status {status}")
    return left_out


@asynccontextmanager
async def _ending(moving: asyncio.Task[None], working: asyncio.Task[list[str]]) -> AsyncIterator[None]:
    """See to it that both have ended: when ``moving`` does, it closes the pipe that ``working``'s thread is at."""
    try:
        yield
    finally:
        moving.cancel()
        await asyncio.gather(moving, working, return_exceptions=True)


async def _tar(container: Container, *words: str) -> Process:
    return await container.exec(["tar", *words], env=[PATH, "LC_ALL=C"])


async def _status(container: Container, words: Sequence[str]) -> int:
    return await (await container.exec(words, env=[PATH])).wait()


async def _complaints(process: Process) -> str:
    """What a process writes to standard error until its end, in one line."""
    said = b""
    async for data in process.stderr():
        said = (said + data)[:MAX_STDERR]
    return "; ".join(said.decode(errors="replace").split("\n")).rstrip("; ")


async def _feed(process: Process, source: int) -> None:
    """Give a process what comes from a pipe; without a process that takes it the pipe is closed."""
    try:
        with suppress(AgentError):
            while data := await asyncio.to_thread(os.read, source, CHUNK):
                await process.write(data)
            await process.close_stdin()
    finally:
        os.close(source)


async def _drain(process: Process, target: int) -> None:
    """Give a pipe what a process writes; when nobody reads it the process ends."""
    try:
        async for data in process.stdout():
            await asyncio.to_thread(write_all, target, data)
    except BrokenPipeError:
        with suppress(AgentError):
            await process.signal(signal.SIGKILL)
    finally:
        os.close(target)


def _pack(target: int, source: Path, name: str) -> list[str]:
    """Write an archive of a file or a directory to a descriptor, which is closed; returns what is left out."""
    left_out: list[str] = []

    def checked(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        if member.ischr() or member.isblk():
            left_out.append(member.name)
            return None
        return member

    # Of GNU: busybox knows no other way to write down long names.
    with os.fdopen(target, "wb") as file:
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.GNU_FORMAT) as archive:
            archive.add(source, arcname=name, filter=checked)
    return left_out


def _unpack(source: int, directory: Path, old: str, new: str) -> list[str]:
    with os.fdopen(source, "rb") as file:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            left_out = unpack(archive, directory, old, new)
        while file.read(CHUNK):  # what follows an archive's end is padding
            pass
    return left_out

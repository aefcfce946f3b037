"""Copy files and directories into a container and out of it, as cp(1) and `docker cp` do.

tar(1) archives go through a process in the container: so mounts and links resolve as the container sees them, and
nothing outside is reachable.  The container needs `sh` and `tar`, as with `kubectl cp`.
"""

from __future__ import annotations

import asyncio
import fcntl
import io
import os
import posixpath
import re
import signal
import stat
import tarfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from caisson.agent.client.caller import CHUNK, PATH, write_all
from caisson.agent.client.connection import Agent, Container, Process
from caisson.agent.client.copy_scripts import GET, PUT
from caisson.agent.client.errors import AgentError, CopyError, ProgramError, UsageError
from caisson.agent.client.unpack import open_archive, unpack, unpack_to

#: A container's name and a path in it; anything that begins with "/" or "." is a host path.
LOCATION = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*):(.+)", re.DOTALL)

#: Maximum bytes of stderr to show.
MAX_STDERR = 4096

#: Seconds for an interrupted process to clean up and exit, and between two progress lines.
STOP_TIMEOUT = 1.5
PROGRESS_INTERVAL = 2.0

#: Maximum size of a file that claims to be empty: those in /proc and /sys are read to their end.
MAX_UNSIZED = 64 << 20


@dataclass(frozen=True)
class Location:
    """The location of a file: ``container`` is empty for the host."""

    container: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Location:
        """Parse CONTAINER:PATH, or a host path.  Raises UsageError."""
        found = LOCATION.fullmatch(text)
        if not text or text.endswith(":"):
            raise UsageError(f"{text!r}: is neither a path nor CONTAINER:PATH; give one of these")
        return cls(found[1], posixpath.join("/", found[2])) if found else cls("", text)


class Progress:
    """Count bytes, and report the total periodically."""

    def __init__(self, report: Callable[[str], None] | None = None) -> None:
        self._report = report
        self._reported = time.monotonic()
        self._bytes = 0

    def add(self, count: int) -> None:
        self._bytes += count
        if self._report and self._bytes >= CHUNK and time.monotonic() - self._reported > PROGRESS_INTERVAL:
            self._reported = time.monotonic()
            self._report(f"{self._bytes / 1e6:.0f} MB copied")


async def copy(
    agent: Agent,
    source: str,
    target: str,
    report: Callable[[str], None] | None = None,
    reach: Callable[[str], Awaitable[Container]] | None = None,
) -> list[str]:
    """Copy a file or a directory between the host and a container, one of which is CONTAINER:PATH.

    Copies into an existing directory, otherwise to the target's name; SOURCE/. copies the contents.  New files get the
    source's mode (on the host minus the umask) and time, and belong to root in the container and to the caller on the
    host; existing modes are kept.  If interrupted, it leaves nothing incomplete.

    ``reach`` returns a running container with the files of the named one.  Returns the names of files that cannot be
    copied: sockets and devices.  Raises UsageError, CopyError, AgentError.
    """
    from_, to = parse_locations(source, target)
    progress = Progress(report)
    name = from_.container or to.container
    container = agent.container(name) if reach is None else await reach(name)
    try:
        if to.container:
            return await put(container, from_.path, to.path, progress)
        return await get(container, from_.path, to.path, progress)
    except ProgramError as error:
        raise UsageError(f"cp: the container lacks `sh` or `tar`: {error}") from error


def parse_locations(source: str, target: str) -> tuple[Location, Location]:
    """Parse the locations of `copy`, one of which is in a container.  Raises UsageError."""
    from_, to = Location.parse(source), Location.parse(target)
    if bool(from_.container) == bool(to.container):
        raise UsageError("cp: one of the two must be a path in a container, CONTAINER:PATH, and the other the host's")
    return from_, to


def _wants_directory(path: str) -> bool:
    return path.endswith(("/", "/.", "/..")) or path in (".", "..")


def _wants_contents(path: str) -> bool:
    return path.endswith("/.") or path == "."


async def put(container: Container, source: str, path: str, progress: Progress | None = None) -> list[str]:
    """Copy from the host into a container; as `copy`."""
    origin = Path(source)
    try:
        state = origin.stat() if _wants_directory(source) else origin.lstat()
    except OSError as error:
        raise CopyError(f"{source}: {error.strerror}") from error
    directory = stat.S_ISDIR(state.st_mode)
    if _wants_directory(source) and not directory:
        raise CopyError(f"{source}: Not a directory")
    if (kind := _uncopyable_type(state.st_mode)) is not None:
        raise CopyError(f"{source}: a {kind} cannot be copied")
    name = origin.name if origin.name not in ("", "..") else origin.resolve().name or "root"
    kind = "contents" if _wants_contents(source) else "directory" if directory else "file"
    words = [posixpath.normpath(path), name, kind, str(int(_wants_directory(path)))]
    async with _script(container, PUT, words) as process:
        read_end, write_end = _pipe()
        packing = asyncio.create_task(asyncio.to_thread(_pack, write_end, origin.resolve() if directory else origin))
        feeding = asyncio.create_task(_feed(process, read_end, progress or Progress()))
        async with _ensure_ended(feeding, packing):
            complaints = await _read_errors(process)
            await feeding
            try:
                left_out = await packing
            except BrokenPipeError:  # tar has exited first: it says why
                left_out = []
            except OSError as error:
                raise CopyError(f"{error.filename or source}: {error.strerror or error}") from error
        if status := await process.wait():
            raise CopyError(complaints or f"tar in the container: exited with status {status}")
    return left_out


async def get(container: Container, path: str, target: str, progress: Progress | None = None) -> list[str]:
    """Copy from a container to the host; as `copy`."""
    parent, name = posixpath.split(posixpath.normpath(path))
    if _wants_directory(path):
        parent, old = posixpath.join(parent, name), "."
    else:
        old = name or "."
    place = Path(target)
    if place.is_dir():
        into = _wants_contents(path) or not name
        directory, new = place, "." if into else name
    elif _wants_directory(target):
        raise CopyError(f"{target}: no such directory")
    else:
        place = place.resolve() if place.is_file() else place
        directory, new = place.parent, place.name
    if not directory.is_dir():
        raise CopyError(f"{directory}: no such directory")
    async with _script(container, GET, [parent, old, path]) as process:
        read_end, write_end = _pipe()
        unpacking = asyncio.create_task(asyncio.to_thread(_unpack, read_end, directory, old, new))
        draining = asyncio.create_task(_drain(process, write_end, progress or Progress()))
        async with _ensure_ended(draining, unpacking):
            complaints = await _read_errors(process)
            await draining
            try:
                left_out = await unpacking
            except OSError as error:
                raise CopyError(f"{target}: {error.filename or ''}: {error.strerror or error}") from error
            except tarfile.TarError as error:
                status = await process.wait()
                raise CopyError(
                    complaints if status and complaints else f"the container sent an invalid archive: {error}"
                ) from error
        if status := await process.wait():
            raise CopyError(complaints or f"tar in the container: exited with status {status}")
    return left_out + [f"{path}: {one}" for one in complaints.split("; ") if one.endswith("socket ignored")]


@asynccontextmanager
async def _script(container: Container, script: str, words: list[str]) -> AsyncIterator[Process]:
    """Run a script in the container for the duration of a block; on failure it is killed with all its children."""
    process = container.process(uuid.uuid4().hex)
    argv = ["sh", "-c", script, "sh", *map(_escape, words), process.exec_id]
    try:
        await container.exec(argv, env=[PATH, "LC_ALL=C"], exec_id=process.exec_id)
        yield process
    except BaseException:
        with suppress(AgentError, TimeoutError):
            await process.signal(signal.SIGTERM)
            await process.close_stdin()  # end tar's input before the shell sees the signal
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT)
            except TimeoutError:
                await process.signal(signal.SIGKILL)
        raise


def _escape(word: str) -> str:
    """Return a name for printf(1)'s %b, whatever bytes are in it."""
    return re.sub(rb"[^A-Za-z0-9/._-]", lambda found: b"\\0%03o" % found[0][0], os.fsencode(word)).decode()


@asynccontextmanager
async def _ensure_ended(moving: asyncio.Task[None], working: asyncio.Task[list[str]]) -> AsyncIterator[None]:
    """Ensure that both have ended: when ``moving`` ends, it closes the pipe that ``working``'s thread uses."""
    try:
        yield
    finally:
        moving.cancel()
        await asyncio.gather(moving, working, return_exceptions=True)


async def _read_errors(process: Process) -> str:
    """Return a process's standard error output until its exit, as one line."""
    said = b""
    async for data in process.stderr():
        said = (said + data)[:MAX_STDERR]
    return "; ".join(said.decode(errors="replace").split("\n")).rstrip("; ")


def _pipe() -> tuple[int, int]:
    """Create a pipe that holds the data of one call."""
    read_end, write_end = os.pipe()
    with suppress(OSError):  # more than /proc/sys/fs/pipe-max-size
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, CHUNK)
    return read_end, write_end


async def _feed(process: Process, source: int, progress: Progress) -> None:
    """Copy from a pipe to a process; the pipe is closed when the process accepts no more."""

    async def pieces() -> AsyncIterator[bytes]:
        while data := await asyncio.to_thread(os.read, source, CHUNK):
            yield data
            progress.add(len(data))

    try:
        with suppress(AgentError):
            await process.feed(pieces())
    finally:
        os.close(source)


async def _drain(process: Process, target: int, progress: Progress) -> None:
    """Copy a process's output to a pipe; the process is killed when the pipe has no reader."""
    try:
        async for data in process.stdout():
            await asyncio.to_thread(write_all, target, data)
            progress.add(len(data))
    except BrokenPipeError:
        with suppress(AgentError):
            await process.signal(signal.SIGKILL)
    finally:
        os.close(target)


def _uncopyable_type(mode: int) -> str | None:
    """Return the type of a file that cannot be copied."""
    if stat.S_ISSOCK(mode):
        return "socket"
    return "device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else None


def _pack(target: int, source: Path) -> list[str]:
    """Write an archive of a file or a directory, called "x" in it, to a descriptor, which is closed.

    Returns the names of files left out.  Raises OSError.
    """
    left_out: list[str] = []
    with os.fdopen(target, "wb") as file:
        # GNU format: the only one for long names that busybox understands.
        options = {"format": tarfile.GNU_FORMAT, "encoding": "utf-8", "errors": "surrogateescape"}
        with tarfile.open(fileobj=file, mode="w|", **options) as archive:  # type: ignore[call-overload]
            ways = [(source, "x")]
            while ways:
                path, name = ways.pop()
                mode = path.lstat().st_mode
                if kind := _uncopyable_type(mode):
                    left_out.append(f"{path}: a {kind}")
                    continue
                _add(archive, path, name)
                archive.members = []  # tarfile would keep them all
                if stat.S_ISDIR(mode):
                    ways += [(inner, f"{name}/{inner.name}") for inner in sorted(path.iterdir(), reverse=True)]
    return left_out


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    member = archive.gettarinfo(path, name)
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = max(0, int(member.mtime))
    if not member.isfile():
        archive.addfile(member)
        return
    with path.open("rb") as contents:
        if os.fstat(contents.fileno()).st_blocks == 0 and member.size <= os.sysconf("SC_PAGE_SIZE"):
            data = contents.read(MAX_UNSIZED)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        else:
            archive.addfile(member, contents)


def _unpack(source: int, directory: Path, old: str, new: str) -> list[str]:
    left_out: list[str] = []
    with os.fdopen(source, "rb") as file, open_archive(file) as archive:
        place = directory / new
        if place.exists() and not place.is_file() and not place.is_dir():
            with place.open("wb") as target:
                unpack_to(archive, target)
        else:
            left_out = unpack(archive, directory, old, new)
        while file.read(CHUNK):  # padding follows an archive's end
            pass
    return [f"{name}: a device" for name in left_out]

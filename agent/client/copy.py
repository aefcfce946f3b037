"""Copy files and directories into a container and out of it, as cp(1) and `docker cp` do.

tar(1) archives go through a process in the container: so mounts and links resolve as the container sees them, and
nothing outside is reachable.  The container needs `sh` and `tar`, as with `kubectl cp`.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import signal
import stat
import tarfile
import time
from _queue import SimpleQueue
from _thread import start_new_thread
from pathlib import Path

from caisson.agent.client.bulk import BulkProcess
from caisson.agent.client.caller import CHUNK, PATH, ROOT
from caisson.agent.client.copy_scripts import GET, PUT
from caisson.agent.client.errors import AgentError, CopyError, ProgramError, Reason, UsageError
from caisson.agent.client.pack import Pieces, pack, uncopyable_type
from caisson.agent.client.unpack import ReceivedArchive, unpack, unpack_to
from caisson.agent.rpc.ttrpc.blocking import take
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any, Self

    from caisson.agent.client.guest import Machine

#: A container's name and a path in it; anything that begins with "/" or "." is a host path.
LOCATION = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*):(.+)", re.DOTALL)

#: Maximum bytes of stderr to show.
MAX_STDERR = 4096

#: Seconds for a script to start on a busy machine, and between two progress lines.
START_TIMEOUT = 60.0
PROGRESS_INTERVAL = 2.0


class Location(Record):
    """The location of a file: ``container`` is empty for the host."""

    container: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Self:
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


class FilesProcess(BulkProcess):
    """A process with the files of a container, which may have exited: then in one on the same root, removed at the end.

    Only the VM's default container is created.
    """

    _stand_in = ""

    def start(self, document: Mapping[str, Any], timeout: float | None = None) -> None:
        try:
            super().start(document, timeout)
        except AgentError as error:
            if error.reason is not Reason.CONTAINER_STOPPED or not (root := self._root()):
                raise
            self._container_id = self._make_stand_in(root)
            super().start(document, timeout)

    def close(self) -> None:
        super().close()
        if self._stand_in:
            from caisson.agent.client.connection import call_sync

            with contextlib.suppress(AgentError):
                call_sync(self._machine, lambda agent: agent.container(self._stand_in).remove())

    def _root(self) -> str:
        """Return the guest's path of the container's root, if it is kept after its exit."""
        from caisson.agent.client.registry import container_registry  # late, as all that only an exited container needs

        return str(container_registry(self._machine).metadata(self._container_id).get("root") or "")

    def _make_stand_in(self, root: str) -> str:
        from caisson.agent.client import specs
        from caisson.agent.client.connection import call_sync

        document = specs.container_document(root, scratch=())
        document["root"]["readonly"] = False
        self._stand_in = f"{self._container_id[:200]}.files"
        call_sync(self._machine, lambda agent: agent.ensure_container(self._stand_in, document))
        return self._stand_in


def copy(machine: Machine, source: str, target: str, report: Callable[[str], None] | None = None) -> list[str]:
    """Copy a file or a directory between the host and a container, one of which is CONTAINER:PATH.

    Copies into an existing directory, otherwise to the target's name; SOURCE/. copies the contents.  New files get the
    source's mode (on the host minus the umask) and time, and belong to root in the container and to the caller on the
    host; existing modes are kept.  If interrupted, it leaves nothing incomplete.

    Returns the names of files that cannot be copied: sockets and devices.  Raises UsageError, CopyError, AgentError.
    """
    from_, to = parse_locations(source, target)
    process = FilesProcess(machine, from_.container or to.container)
    try:
        if to.container:
            return put(process, from_.path, to.path, Progress(report))
        return get(process, from_.path, to.path, Progress(report))
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


def put(process: BulkProcess, source: str, path: str, progress: Progress | None = None) -> list[str]:
    """Copy from the host into a container, by a process that is not started yet; as `copy`."""
    origin = Path(source)
    try:
        state = origin.stat() if _wants_directory(source) else origin.lstat()
    except OSError as error:
        raise CopyError(f"{source}: {error.strerror}") from error
    directory = stat.S_ISDIR(state.st_mode)
    if _wants_directory(source) and not directory:
        raise CopyError(f"{source}: Not a directory")
    if (kind := uncopyable_type(state.st_mode)) is not None:
        raise CopyError(f"{source}: a {kind} cannot be copied")
    name = origin.name if origin.name not in ("", "..") else origin.resolve().name or "root"
    kind = "contents" if _wants_contents(source) else "directory" if directory else "file"
    words = [posixpath.normpath(path), name, kind, str(int(_wants_directory(path)))]
    count = (progress or Progress()).add

    def send(piece: memoryview) -> None:
        process.send(piece)
        count(len(piece))

    left_out: list[str] = []
    with _script(process, PUT, words) as complaints:
        with contextlib.suppress(AgentError):  # tar has exited first: it says why
            try:
                left_out = pack(origin.resolve() if directory else origin, Pieces(send))
            except OSError as error:
                raise CopyError(f"{error.filename or source}: {error.strerror or error}") from error
            process.end_input()
        text, status = complaints.text(), process.wait()
    _check_status(status, text)
    return left_out


def get(process: BulkProcess, path: str, target: str, progress: Progress | None = None) -> list[str]:
    """Copy from a container to the host, by a process that is not started yet; as `copy`."""
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
    count = (progress or Progress()).add

    def receive() -> memoryview:
        piece = process.receive()
        count(len(piece))
        return piece

    left_out: list[str] = []
    invalid: tarfile.TarError | None = None
    with _script(process, GET, [parent, old, path]) as complaints:
        try:
            left_out = _unpack(receive, directory, old, new)
        except OSError as error:
            where = f"{target}: {error.filename}" if error.filename else target
            raise CopyError(f"{where}: {error.strerror or error}") from error
        except tarfile.TarError as error:
            invalid = error
            with contextlib.suppress(AgentError):  # it has exited: this is why the archive is incomplete
                process.signal(signal.SIGKILL)
        text, status = complaints.text(), process.wait()
    if invalid and not (status and text):
        raise CopyError(f"the container sent an invalid archive: {invalid}") from invalid
    _check_status(status, text)
    return left_out + [f"{path}: {one}" for one in text.split("; ") if one.endswith("socket ignored")]


def _unpack(receive: Callable[[], memoryview], directory: Path, old: str, new: str) -> list[str]:
    archive = ReceivedArchive(receive)
    place = directory / new
    left_out: list[str] = []
    if place.exists() and not place.is_file() and not place.is_dir():
        with place.open("wb", buffering=0) as target:
            unpack_to(archive, target.fileno())
    else:
        left_out = unpack(archive, directory, old, new)
    while receive():  # padding follows an archive's end
        pass
    return [f"{name}: a device" for name in left_out]


def _check_status(status: int, complaints: str) -> None:
    if status:
        raise CopyError(complaints or f"tar in the container: exited with status {status}")


@contextlib.contextmanager
def _script(process: BulkProcess, script: str, words: list[str]) -> Iterator[_Complaints]:
    """Run a script in the container for the duration of a block; on failure it is stopped with all its children."""
    document = {
        "args": ["sh", "-c", script, "sh", *map(_escape, words), process.exec_id],
        "env": [PATH, "LC_ALL=C"],
        "cwd": "/",
        "user": dict(ROOT),
    }
    try:
        process.start(document, START_TIMEOUT)
        yield _Complaints(process)
    except BaseException:
        process.stop()
        raise
    finally:
        process.close()


def _escape(word: str) -> str:
    """Return a name for printf(1)'s %b, whatever bytes are in it."""
    return re.sub(rb"[^A-Za-z0-9/._-]", lambda found: b"\\0%03o" % found[0][0], os.fsencode(word)).decode()


class _Complaints:
    """A process's standard error output, read by a thread: it must not fill up."""

    def __init__(self, process: BulkProcess) -> None:
        self._result: SimpleQueue[bytes | AgentError] = SimpleQueue()
        start_new_thread(self._read, (process,))

    def _read(self, process: BulkProcess) -> None:
        said = b""
        try:
            while data := process.read("ReadStderr"):
                said = (said + bytes(data))[:MAX_STDERR]
        except AgentError as error:
            self._result.put(error)
        else:
            self._result.put(said)

    def text(self) -> str:
        """Return all of it as one line, after the process's exit.  Raises AgentError."""
        result = take(self._result)
        if isinstance(result, AgentError):
            raise result
        return "; ".join(result.decode(errors="replace").split("\n")).rstrip("; ")

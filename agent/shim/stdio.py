"""A task's standard streams: FIFOs of containerd's clients, files, or logging programs.

Source: containerd, core/runtime/v2/README.md, "IO"; pkg/cio.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

#: Bytes to read at once from the guest, or from a FIFO.
BLOCK = 1 << 16

#: Seconds for a logging program to start and to exit.
LOGGER_TIMEOUT = 12.0


class Writer:
    """The writing end of a host stream; closing it gives readers end of file."""

    def __init__(self, fd: int, held: int = -1) -> None:
        """``held`` is a reading end of a FIFO: it lets a client disconnect and return (attach) without SIGPIPE."""
        self._fd = fd
        self._held = held

    @classmethod
    def open(cls, url: str) -> Writer:
        """Open a FIFO, or a file to append to.  Raises OSError."""
        path = _path_of(url)
        if _is_fifo(path):
            held = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                return cls(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC), held)
            except OSError:
                os.close(held)
                raise
        return cls(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644))

    async def write(self, data: bytes) -> None:
        """Write all of it, waiting while the pipe is full.  Raises OSError."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                await _ready(self._fd, write=True)

    def close(self) -> None:
        """Close both ends.  Idempotent."""
        for fd in (self._fd, self._held):
            if fd >= 0:
                os.close(fd)
        self._fd = self._held = -1


class StdinReader:
    """The reading end of a process's stdin.  A writing end is held: only ``close_input`` causes end of file."""

    def __init__(self, path: str) -> None:
        """Take the path or URL of a FIFO; `open` opens it.  Raises OSError if it does not exist."""
        self._path = Path(_path_of(path))
        self._path.stat()
        self._fd = self._held = -1
        self._input_ended = False

    def open(self) -> None:
        """Open both ends; the client, whose open(2) waits for this, can write now.  Raises OSError.

        Not before Create has been answered: when a client has sent everything, it calls CloseIO, and nerdctl gives up
        if containerd does not know the task yet.
        """
        self._fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not self._input_ended:
            self._held = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    async def read(self) -> bytes:
        """Return bytes as they come; none at the end.  Raises OSError."""
        while True:
            try:
                return os.read(self._fd, BLOCK)
            except BlockingIOError:
                await _ready(self._fd, write=False)

    def close_input(self) -> None:
        """Give the reader end of file after queued input (CloseIO)."""
        self._input_ended = True
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def close(self) -> None:
        """Close both ends.  Idempotent."""
        self.close_input()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Logger:
    """A logging program (``binary:///path?name=value``): it reads both streams from pipes, descriptors 3 and 4."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)

    @classmethod
    async def start(cls, url: str, container_id: str, namespace: str) -> tuple[Logger, Writer, Writer]:
        """Start it and wait until it is ready.  Raises OSError or TimeoutError."""
        parts = urlsplit(url)
        arguments = [word for pair in parse_qsl(parts.query, keep_blank_values=True) for word in pair if word]
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
        (out_read, out_write), (err_read, err_write), (ready_read, ready_write) = pipes
        mine, theirs = (out_write, err_write, ready_read), (out_read, err_read, ready_write)
        for fd in mine:
            os.set_blocking(fd, False)
        environment = os.environ | {"CONTAINER_ID": container_id, "CONTAINER_NAMESPACE": namespace}
        logger = None
        try:
            try:
                logger = cls(_spawn_logger([unquote(parts.path), *arguments], environment, theirs))
            finally:
                for fd in theirs:
                    os.close(fd)
            async with asyncio.timeout(LOGGER_TIMEOUT):
                await _ready(ready_read, write=False)
        except BaseException as error:
            for fd in mine:
                os.close(fd)
            if logger is not None:
                logger.kill()
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"{unquote(parts.path)}: not ready within {LOGGER_TIMEOUT:g} s") from error
            raise
        os.close(ready_read)
        return logger, Writer(out_write), Writer(err_write)

    def kill(self) -> None:
        """Kill it at once."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._reap()

    async def stop(self) -> None:
        """Close its pipes, let it read to their end, then stop it."""
        try:
            async with asyncio.timeout(LOGGER_TIMEOUT):
                await _ready(self._pidfd, write=False)
            self._reap()
        except TimeoutError:
            self.kill()

    def _reap(self) -> None:
        os.waitpid(self._pid, 0)
        os.close(self._pidfd)


def _spawn_logger(words: list[str], environment: dict[str, str], fds: tuple[int, int, int]) -> int:
    """Start a program with these as descriptors 3 to 5, and no other; returns its pid.  Raises OSError."""
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in fds]  # out of the way of 3 to 5
    try:
        return os.posix_spawn(
            words[0], words, environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                *((os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(above, 3)),
            ],
            setsigdef=(signal.SIGPIPE,),
        )  # fmt: skip
    finally:
        for fd in above:
            os.close(fd)


class TaskStreams:
    """The streams of one process; unused ones are None."""

    def __init__(self, stdin: StdinReader | None, stdout: Writer | None, stderr: Writer | None, logger: Logger | None):
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self._logger = logger

    @classmethod
    async def open(cls, stdin: str, stdout: str, stderr: str, container_id: str, namespace: str) -> TaskStreams:
        """Open them by their paths or URLs.  Raises OSError or TimeoutError; then nothing is left open."""
        if stdout.startswith("binary:"):
            reader = StdinReader(stdin) if stdin else None
            try:
                logger, out, err = await Logger.start(stdout, container_id, namespace)
            except BaseException:
                if reader is not None:
                    reader.close()
                raise
            return cls(reader, out, err, logger)
        opened: list[Writer | StdinReader] = []
        try:
            output = Writer.open(stdout) if stdout else None
            opened += [output] if output else []
            errors = Writer.open(stderr) if stderr else None
            opened += [errors] if errors else []
            return cls(StdinReader(stdin) if stdin else None, output, errors, None)
        except OSError:
            for one in opened:
                one.close()
            raise

    async def close(self) -> None:
        """Close all of them, and stop the logging program."""
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        if self._logger is not None:
            await self._logger.stop()


async def copy_output(read: Callable[[], Awaitable[bytes]], writer: Writer | None) -> None:
    """Copy a process's output to its end, and close the writer: clients wait for this before they delete a task.

    Unused output is still read.  ``read`` returns b"" at the end.
    """
    wanted = writer is not None
    try:
        while data := await read():
            if writer is not None and wanted:
                try:
                    await writer.write(data)
                except OSError:
                    wanted = False  # its disk is full, or its reader is gone: that must not block the process
    finally:
        if writer is not None:
            writer.close()


async def _ready(fd: int, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def mark() -> None:
        if not ready.done():
            ready.set_result(None)

    (loop.add_writer if write else loop.add_reader)(fd, mark)
    try:
        await ready
    finally:
        (loop.remove_writer if write else loop.remove_reader)(fd)


def _path_of(url: str) -> str:
    """Return the path of a plain path or of a fifo:// or file:// URL."""
    return unquote(urlsplit(url).path) if "://" in url else url


def _is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(Path(path).stat().st_mode)
    except FileNotFoundError:
        return False

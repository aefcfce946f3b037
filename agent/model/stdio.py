"""A process's standard streams: pipes, or a terminal.

The rules, each learned from a failure seen by users of container runtimes:
* output is complete before its end is reported, and the end follows the process's own exit, whoever else (a background
  job) still holds the pipe or terminal;
* nothing is read before it is requested: a slow reader slows the writer, the agent buffers nothing.  A bulk reader gets
  a larger pipe;
* closing standard input never touches output.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager

from caisson.agent.base.errors import BrokenStream, EndOfStream
from caisson.agent.model.bulk import Bulk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from caisson.agent.model.reaper import Child

#: Maximum bytes of one read: with their framing they fit into a message (4 MiB, by gRPC's and ttrpc's limit).
LARGEST_READ = 63 << 16

#: The size to which the pipe of any bulk stream may grow: the kernel allows it to every program.  While another process
#: moves data, no read returns more: an echo has to wait until a piece is read and sent.
BULK_PIPE = 1 << 20

#: The size of a large pipe, for a stream that fills a BULK_PIPE: a call costs as much CPU time as moving half a MiB.
LARGE_PIPE = 1 << 22

#: A reader that gets half of the default pipe size, and asks for more, gets a larger pipe.  (Not all of its bytes can
#: be used: a write that does not fit into the last page begins a new one.)
BULK = 1 << 15

#: Seconds to let a busy stream (whose last read returned a page) gather more before it is read again.  Programs write a
#: page at a time (stdio(3) to a pipe), and a call for each takes more than twice the CPU time.
GATHER = 0.001
PAGE = 1 << 12

#: A terminal whose reads return this much is busy: stdio(3) writes to one in pieces of this size.
TERMINAL_PIECE = 1 << 10

#: The maximum contents of a terminal's two buffers (tty_buffer.c, n_tty.c); pipes are queried.
TERMINAL_CAPACITY = 1 << 17
F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032


class _End:
    """The agent's end of a stream: a descriptor used by one caller at a time, and closed only here.

    Closing it under a waiting caller would let its number be reused for something else.  A pipe is large only while its
    stream flows.
    """

    def __init__(self, fd: int, bulk: Bulk | None = None, *, may_be_large: bool = True) -> None:
        """``bulk`` is shared with other streams."""
        os.set_blocking(fd, False)
        self._fd = fd
        self._lock = asyncio.Lock()
        self._released = False
        self._bulk = bulk or Bulk()
        self._may_be_large = may_be_large
        self._is_large = False

    @asynccontextmanager
    async def _use(self) -> AsyncIterator[None]:
        async with self._lock:
            try:
                yield
            finally:
                if self._released:
                    self._close()

    def release(self) -> None:
        """Close the descriptor once it is not in use.  Idempotent."""
        self._released = True
        if not self._lock.locked():
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._give_large()

    def _enlarge(self) -> bool:
        """Make the pipe a large one; False if it may not be."""
        if not self._is_large and self._may_be_large and self._bulk.take_pipe():
            self._is_large = True
            if not resize_pipe(self._fd, LARGE_PIPE):
                self._may_be_large = False
                self._give_large()
        return self._is_large

    def _reduce(self) -> None:
        """Make a large pipe an ordinary one, unless it holds more than that."""
        if self._is_large and resize_pipe(self._fd, BULK_PIPE):
            self._give_large()

    def _give_large(self) -> None:
        if self._is_large:
            self._is_large = False
            self._bulk.give_pipe()


class Output(_End):
    """The reading end of one output stream."""

    def __init__(
        self,
        fd: int,
        bulk: Bulk | None = None,
        *,
        grows: bool = False,
        is_terminal: bool = False,
        may_be_large: bool = True,
    ) -> None:
        super().__init__(fd, bulk, may_be_large=may_be_large)
        self._grows = grows
        self._is_terminal = is_terminal
        self._gathered = bytearray()
        self._flows = False
        self._left: int | None = None  # bytes that may still arrive, once the process has exited

    async def read(self, size: int, child: Child) -> bytes:
        """Read available output, at most ``size`` bytes; waits until there is some.  A cancelled read consumes nothing.

        Raises EndOfStream.
        """
        size = min(size, LARGEST_READ)
        if size == 0:
            return b""
        async with self._use():
            if self._gathered:  # from a cancelled read
                return self._take_gathered(size)
            looks_again = self._is_terminal  # tty_buffer.c: the last data may still be in flight when it is seen closed
            while not self._released:
                exited = child.status is not None  # checked first: anything it wrote is in the buffer by now
                if exited and self._left is None:
                    self._left = _capacity(self._fd)
                most = size if size <= BULK_PIPE or self._bulk.is_only(child) else BULK_PIPE
                try:
                    data = os.read(self._fd, most if self._left is None else min(most, self._left))
                except BlockingIOError:
                    if not exited:
                        await _event_or_exit(self._fd, child, writing=False)
                        if self._flows:
                            await asyncio.sleep(GATHER)
                        continue
                    data = b""
                except OSError:  # EIO: the last holder of the terminal has closed it
                    data = b""
                if not data and looks_again:
                    looks_again = False
                    await asyncio.sleep(GATHER)
                    continue
                self._bulk.note(child)
                if not data:  # also once everything that can have been buffered at the exit was read
                    self.release()
                    break
                if self._left is not None:
                    self._left -= len(data)
                elif self._grows and len(data) >= BULK:
                    self._grow(size, len(data))
                self._flows = len(data) >= PAGE
                if self._is_large and not self._flows:
                    self._reduce()
                if self._is_terminal and not exited and len(data) >= TERMINAL_PIECE:
                    return await self._gather(data, size)
                return data
            raise EndOfStream

    async def _gather(self, data: bytes, size: int) -> bytes:
        """Gather more of a busy terminal's output: the kernel returns less than a page at a time."""
        self._gathered += data
        came = len(data)
        while came >= TERMINAL_PIECE and len(self._gathered) < size:
            await asyncio.sleep(GATHER)
            came = self._gather_all_there_is(size)
        return self._take_gathered(size)

    def _gather_all_there_is(self, size: int) -> int:
        before = len(self._gathered)
        try:
            while not self._released and (left := size - len(self._gathered)) > 0:
                data = os.read(self._fd, left)
                if not data:
                    break
                self._gathered += data
        except OSError:
            pass  # none now, or never again: the next read will tell
        return len(self._gathered) - before

    def _take_gathered(self, size: int) -> bytes:
        data = bytes(self._gathered[:size])
        del self._gathered[:size]
        return data

    def _grow(self, wanted: int, came: int) -> None:
        """Grow the pipe to the size that the reader asks for: fewer calls are faster.

        The room is in the kernel, charged to the writer's container, and only grows when useful; a full pipe slows the
        writer down.
        """
        if wanted > BULK_PIPE and came >= BULK_PIPE // 2 and self._enlarge():
            return
        size = min(wanted, BULK_PIPE)
        if _capacity(self._fd) < size:
            self._grows = resize_pipe(self._fd, size)

    def exited(self) -> None:
        """Close an empty pipe: the process has exited, whether or not anyone will read it."""
        if self._fd >= 0 and _waiting(self._fd) == 0:
            self.release()


class Input(_End):
    """The writing end of standard input.

    Bulk input gets a larger pipe, filled in large pieces: a reader of small ones (busybox's tar reads 4 KiB) would
    otherwise wake the agent for each.
    """

    def __init__(self, fd: int, bulk: Bulk | None = None, *, may_be_large: bool = True) -> None:
        super().__init__(fd, bulk, may_be_large=may_be_large)
        self._grown = False

    async def write(self, data: bytes | memoryview, child: Child) -> int:
        """Write all of it; returns how much was accepted: nothing after ``close``.  Raises BrokenStream."""
        async with self._use():
            if self._released and child.status is None:
                return 0
            self._bulk.note(child)
            view = memoryview(data)
            if self._is_large and len(view) < PAGE:
                self._reduce()
            while view:
                if self._released:
                    raise BrokenStream
                try:
                    view = view[os.write(self._fd, view) :]
                except BlockingIOError:
                    if self._grow(len(view)):
                        continue
                    await _event_or_exit(self._fd, child, writing=True)
                    if len(view) >= BULK:
                        await asyncio.sleep(GATHER)  # a page is free; soon there will be room for many
                except OSError:
                    raise BrokenStream from None
            return len(data)

    def _grow(self, left: int) -> bool:
        """Grow a full pipe, once, for so many bytes that it has no room for; False if they have to wait."""
        if left >= BULK_PIPE and not self._is_large and self._enlarge():
            return True
        if left < BULK or self._grown:
            return False
        self._grown = True
        return resize_pipe(self._fd, BULK_PIPE)

    async def close(self) -> None:
        """Let the process read end-of-file after what was already written.  Idempotent."""
        async with self._use():
            self._released = True


class Streams:
    """The agent's ends of one process's stdio.  With a terminal, all three are its master."""

    def __init__(self, stdin: Input, stdout: Output, stderr: Output, terminal: int | None) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self._terminal = terminal

    @classmethod
    def of_terminal(cls, master: int, bulk: Bulk | None = None) -> Streams:
        """Take over a terminal's master.  Raises OSError, after which it is closed."""
        ends = [master]
        try:
            for _ in range(2):
                ends.append(os.dup(master))
        except OSError:
            for end in ends:
                os.close(end)
            raise
        output = Output(ends[0], bulk, is_terminal=True)
        return cls(Input(ends[1], bulk), output, output, ends[2])

    @property
    def is_terminal(self) -> bool:
        return self._terminal is not None

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size; the kernel notifies its foreground processes.  Values are 16 bits wide."""
        import fcntl
        import struct
        import termios

        if self._terminal is not None and self._terminal >= 0:
            size = struct.pack("HHHH", rows & 0xFFFF, columns & 0xFFFF, 0, 0)
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    def interrupts(self, data: bytes | memoryview, pid: int) -> bool:
        """Return whether data typed at a terminal interrupt a process: the foreground group gets a signal."""
        if self._terminal is None or self._terminal < 0 or not data:
            return False
        import termios

        try:
            *_, local, _, _, control = termios.tcgetattr(self._terminal)
            typed = bool(local & termios.ISIG) and control[termios.VINTR] in bytes(data)
            return typed and os.tcgetpgrp(self._terminal) == pid
        except (OSError, termios.error):
            return False

    def exited(self) -> None:
        """Close the input of an exited process, and its terminal's size.  Output is kept for its reader."""
        self.stdin.release()
        if self._terminal is None:
            self.stdout.exited()
            self.stderr.exited()
        elif self._terminal >= 0:
            os.close(self._terminal)
            self._terminal = -1

    def close(self) -> None:
        """Close everything.  Idempotent."""
        self.exited()
        self.stdout.release()
        self.stderr.release()


def _capacity(fd: int) -> int:
    import fcntl

    try:
        return fcntl.fcntl(fd, F_GETPIPE_SZ)
    except OSError:
        return TERMINAL_CAPACITY


def resize_pipe(pipe: int, size: int) -> bool:
    """Resize a pipe.  False if the kernel refuses: larger than /proc/sys/fs/pipe-max-size."""
    import fcntl

    try:
        fcntl.fcntl(pipe, F_SETPIPE_SZ, size)
    except OSError:
        return False
    return True


def _waiting(pipe: int) -> int:
    """Return the bytes in a pipe (FIONREAD, pipe(7)).  For a terminal it would miss those in flight."""
    import array
    import fcntl
    import termios

    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


async def _event_or_exit(fd: int, child: Child, *, writing: bool) -> None:
    """Wait until a descriptor is readable (or writable), or the process has exited."""
    loop = asyncio.get_running_loop()
    happened = loop.create_future()

    def wake() -> None:
        if not happened.done():
            happened.set_result(None)

    (loop.add_writer if writing else loop.add_reader)(fd, wake)
    try:
        with child.on_exit(wake):
            await happened
    finally:
        (loop.remove_writer if writing else loop.remove_reader)(fd)

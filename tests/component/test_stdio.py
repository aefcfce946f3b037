"""Test streams: they are complete before EOF, nobody can hold EOF back, and nothing is read before it is requested."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator

import pytest

from caisson.agent.base.errors import BrokenStream, EndOfStream
from caisson.agent.libcontainer.process.launch import Launched, Stdio
from caisson.agent.model.bulk import Bulk
from caisson.agent.model.pipes import Pipes
from caisson.agent.model.process import start_process
from caisson.agent.model.reaper import Child
from caisson.agent.model.stdio import BULK_PIPE, LARGEST_READ, Input, Output, Streams
from tests.component.stream_support import bytes_in, no_descriptor_is_left, pending, read_all, running_child
from tests.support.descriptors import no_descriptor_is_free

PIPE = 65536


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    with no_descriptor_is_left():
        yield


async def test_a_read_waits_for_something_and_takes_no_more_than_asked_for() -> None:
    ours, theirs = os.pipe()
    output, child = Output(ours), running_child()
    assert await output.read(0, child) == b""
    read = await pending(output.read(3, child))
    os.write(theirs, b"abcdef")
    assert await read == b"abc"
    assert bytes_in(ours) == 3
    assert await output.read(10, child) == b"def"
    os.close(theirs)
    assert await read_all(output, child) == b""


@pytest.mark.parametrize("size", [1, 1000, PIPE])
async def test_all_that_was_written_before_the_exit_comes_before_the_end_whoever_holds_the_pipe(size: int) -> None:
    ours, theirs = os.pipe()  # theirs stays open, as in a background job
    output, child = Output(ours), running_child()
    os.write(theirs, bytes(size))
    child._end(0)
    assert await read_all(output, child) == bytes(size)
    os.close(theirs)


async def test_the_exit_ends_a_read_that_waits_and_every_later_one() -> None:
    ours, theirs = os.pipe()
    output, child = Output(ours), running_child()
    read = await pending(output.read(10, child))
    child._end(0)
    for attempt in (read, output.read(10, child), output.read(10, child)):
        with pytest.raises(EndOfStream):
            await attempt
    os.close(theirs)


async def test_a_job_that_writes_for_ever_does_not_hold_back_the_end() -> None:
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    output, child = Output(ours), running_child()
    os.write(theirs, bytes(PIPE))
    child._end(0)
    total = 0
    with pytest.raises(EndOfStream):
        while total < 100 * PIPE:
            total += len(await output.read(1000, child))
            with contextlib.suppress(BlockingIOError):  # until no page of it is free
                os.write(theirs, bytes(1000))
    assert PIPE <= total <= 2 * PIPE
    os.close(theirs)


async def test_nothing_is_read_ahead() -> None:
    ours, theirs = os.pipe()
    output, child = Output(ours), running_child()
    os.write(theirs, bytes(PIPE))
    for _ in range(5):
        await asyncio.sleep(0)
    assert bytes_in(ours) == PIPE
    assert len(await output.read(100, child)) == 100
    assert bytes_in(ours) == PIPE - 100
    output.release()
    os.close(theirs)


async def test_a_cancelled_read_takes_nothing() -> None:
    ours, theirs = os.pipe()
    output, child = Output(ours), running_child()
    read = await pending(output.read(10, child))
    os.write(theirs, b"kept")
    read.cancel()
    await asyncio.wait([read])
    assert read.cancelled()
    late = await output.read(10, child)
    assert late == b"kept"
    output.release()
    os.close(theirs)


async def test_reads_of_one_stream_take_turns() -> None:
    ours, theirs = os.pipe()
    output, child = Output(ours), running_child()
    reads = [await pending(output.read(2, child)) for _ in range(5)]
    os.write(theirs, b"aabbccddee")
    assert await asyncio.gather(*reads) == [b"aa", b"bb", b"cc", b"dd", b"ee"]
    output.release()
    os.close(theirs)


async def test_a_descriptor_is_not_closed_under_who_waits_for_it() -> None:
    ours, theirs = os.pipe()
    output, child = Output(ours), running_child()
    read = await pending(output.read(2, child))
    output.release()
    os.fstat(ours)  # still open
    child._end(0)
    with pytest.raises(EndOfStream):
        await read
    with pytest.raises(OSError):
        os.fstat(ours)
    os.close(theirs)


async def test_a_write_waits_for_room_and_lets_others_go_on() -> None:
    theirs, ours = os.pipe()
    stdin, child = Input(ours), running_child()
    data = os.urandom(LARGEST_READ + 5 * PIPE + 17)
    write = await pending(stdin.write(data, child))
    close = await pending(stdin.close())
    os.set_blocking(theirs, False)
    seen = b""
    while len(seen) < len(data):
        with contextlib.suppress(BlockingIOError):
            seen += os.read(theirs, 4096)
        await asyncio.sleep(0)
    os.set_blocking(theirs, True)
    assert await write == len(data)
    await close
    assert (seen, os.read(theirs, 1)) == (data, b"")
    assert await stdin.write(b"late", child) == 0
    await stdin.close()
    os.close(theirs)


async def test_a_cancelled_write_makes_way() -> None:
    theirs, ours = os.pipe()
    stdin, child = Input(ours, may_be_large=False), running_child()
    write = await pending(stdin.write(bytes(2 * BULK_PIPE), child))
    write.cancel()
    await asyncio.wait([write])
    await stdin.close()
    assert len(os.read(theirs, 2 * BULK_PIPE)) == BULK_PIPE
    assert os.read(theirs, 1) == b""
    os.close(theirs)


async def test_input_in_bulk_gets_a_larger_pipe() -> None:
    theirs, ours = os.pipe()
    stdin, child = Input(ours), running_child()
    assert await stdin.write(b"little", child) == 6
    assert fcntl.fcntl(ours, fcntl.F_GETPIPE_SZ) == PIPE
    assert await stdin.write(bytes(BULK_PIPE // 2), child) == BULK_PIPE // 2  # nobody needs to read
    assert fcntl.fcntl(ours, fcntl.F_GETPIPE_SZ) == BULK_PIPE
    await stdin.close()
    os.close(theirs)


async def test_a_write_that_nobody_reads_is_broken() -> None:
    theirs, ours = os.pipe()
    stdin, child = Input(ours), running_child()
    write = await pending(stdin.write(bytes(2 * LARGEST_READ), child))
    os.close(theirs)
    for attempt in (write, stdin.write(b"x", child)):
        with pytest.raises(BrokenStream):
            await attempt
    stdin.release()


async def test_the_exit_breaks_a_write_that_waits() -> None:
    theirs, ours = os.pipe()  # theirs stays open, as in a background job
    stdin, child = Input(ours), running_child()
    write = await pending(stdin.write(bytes(2 * LARGEST_READ), child))
    child._end(0)
    stdin.release()
    for attempt in (write, stdin.write(b"x", child)):
        with pytest.raises(BrokenStream):
            await attempt
    os.close(theirs)


async def test_a_childs_ends_block_and_ours_do_not() -> None:
    pipes = Pipes()
    theirs = pipes.child_ends
    copies = [os.dup(fd) for fd in (theirs.stdin, theirs.stdout, theirs.stderr)]
    streams = pipes.started()
    assert [os.get_blocking(fd) for fd in copies] == [True] * 3
    ours = [end._fd for end in (streams.stdin, streams.stdout, streams.stderr)]
    assert [os.get_blocking(fd) for fd in ours] == [False] * 3
    assert not any(os.get_inheritable(fd) for fd in ours)
    streams.close()
    streams.close()
    for fd in copies:
        os.close(fd)


def test_pipes_of_a_child_that_did_not_start_and_of_a_given_size() -> None:
    pipes = Pipes(size=1 << 18)
    assert fcntl.fcntl(pipes.child_ends.stdout, 1032) == 1 << 18
    pipes.failed()
    Pipes(size=1 << 40).failed()  # larger than possible: not an error, the default is used


async def test_ends_that_were_read_are_given_back_before_anybody_asks() -> None:
    pipes = Pipes()
    streams, child = pipes.started(), running_child()
    child._end(0)
    streams.exited()
    assert await read_all(streams.stdout, child) == b""
    assert await read_all(streams.stderr, child) == b""
    assert [end._fd for end in (streams.stdin, streams.stdout, streams.stderr)] == [-1] * 3


@pytest.mark.parametrize("held", [False, True], ids=["closed", "held by a job"])
async def test_a_terminals_output_is_complete_before_its_end(held: bool) -> None:
    master, slave = os.openpty()
    streams, child = Streams.of_terminal(master), running_child()
    assert streams.stdout is streams.stderr
    os.write(slave, b"x" * 3000 + b"\n")
    if not held:
        os.close(slave)
    child._end(0)
    streams.exited()
    assert await read_all(streams.stdout, child) == b"x" * 3000 + b"\r\n"
    if held:
        os.close(slave)
    streams.close()


async def test_a_terminal_that_is_found_closed_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    streams, child = Streams.of_terminal(master), running_child()
    os.write(slave, b"late")
    os.close(slave)
    child._end(0)
    real, early = os.read, [OSError(errno.EIO, "")]

    def read(fd: int, size: int) -> bytes:
        if early:
            raise early.pop()
        return real(fd, size)

    monkeypatch.setattr(os, "read", read)
    assert await read_all(streams.stdout, child) == b"late"
    streams.close()


async def test_a_terminals_size() -> None:
    master, slave = os.openpty()
    streams = Streams.of_terminal(master)
    for rows, columns, seen in ((33, 99, (33, 99)), (0x10001, 0xFFFF, (1, 0xFFFF))):
        streams.resize(rows, columns)
        assert struct.unpack("HHHH", fcntl.ioctl(slave, termios.TIOCGWINSZ, bytes(8)))[:2] == seen
    streams.exited()
    streams.resize(1, 1)  # too late, but not an error
    streams.close()
    os.close(slave)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as program:
        yield program
        program.kill()


async def test_a_process_on_a_terminal_does_not_outlive_a_lack_of_descriptors(sleeper: subprocess.Popen[bytes]) -> None:
    master, slave = os.openpty()
    child = Child(sleeper.pid)
    launched = Launched(child, master, os.pidfd_open(sleeper.pid))

    async def launch(stdio: Stdio | None, cgroup_fds: dict[str, int]) -> Launched:
        return launched

    with no_descriptor_is_free(), pytest.raises(OSError, match="Too many open files"):
        await start_process(launch, "x", None, Bulk(), None)
    assert await asyncio.to_thread(sleeper.wait, 10) == -signal.SIGKILL
    os.close(slave)

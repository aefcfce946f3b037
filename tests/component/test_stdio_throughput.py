"""Test how streams that flow are read in large pieces: from larger pipes, and when more has gathered."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import tty
from collections.abc import Iterator

import pytest

from caisson.agent.model import stdio
from caisson.agent.model.bulk import IDLE, Bulk
from caisson.agent.model.pipes import Pipes
from caisson.agent.model.reaper import Child
from caisson.agent.model.stdio import BULK_PIPE, LARGEST_READ, PAGE, Input, Output, Streams
from tests.component.stream_support import bytes_in, no_descriptor_is_left, pending, read_all, running_child

PIPE = 65536


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    with no_descriptor_is_left():
        yield


def fill(fd: int) -> int:
    """Write until the pipe is full; return the number of bytes."""
    os.set_blocking(fd, False)
    total = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            total += os.write(fd, bytes(PIPE))
    return total


@pytest.mark.parametrize(
    ("size", "taken", "room"),
    [
        (0, BULK_PIPE, BULK_PIPE),
        (0, 2 * PIPE, 2 * PIPE),
        (0, PIPE // 2, PIPE),
        (2 * PIPE, LARGEST_READ, 2 * PIPE),
    ],
    ids=["all there is", "twice as much", "Kata's size", "a given size"],
)
async def test_a_pipe_holds_what_its_reader_takes_at_once_and_never_more(size: int, taken: int, room: int) -> None:
    pipes = Pipes(size)
    writer = os.dup(pipes.child_ends.stdout)
    streams, child = pipes.started(), running_child()
    assert fill(writer) == (size or PIPE)  # nobody has read anything yet
    total = 0
    for _ in range(40):
        total += len(await streams.stdout.read(taken, child))
        fill(writer)
        assert bytes_in(streams.stdout._fd) <= room
    assert bytes_in(streams.stdout._fd) == fcntl.fcntl(writer, 1032) == room
    assert fcntl.fcntl(streams.stderr._fd, 1032) == (size or PIPE)
    child._end(0)  # while a job holds the pipe
    assert len(await read_all(streams.stdout, child)) == room
    streams.close()
    os.close(writer)


async def test_a_pipe_that_is_never_half_full_stays_as_it_is() -> None:
    pipes = Pipes()
    writer = os.dup(pipes.child_ends.stdout)
    streams, child = pipes.started(), running_child()
    for _ in range(10):
        os.write(writer, bytes(PIPE // 2 - 1))
        await streams.stdout.read(LARGEST_READ, child)
    assert fcntl.fcntl(writer, 1032) == PIPE
    streams.close()
    os.close(writer)


@pytest.fixture
def bulk(monkeypatch: pytest.MonkeyPatch) -> Bulk:
    """Make pipes small enough to be large without privilege, and allow two large ones."""
    monkeypatch.setattr(stdio, "BULK_PIPE", 4 * PIPE)
    monkeypatch.setattr(stdio, "LARGE_PIPE", 16 * PIPE)
    return Bulk(2)


async def flow(streams: Streams, writer: int, child: Child, pieces: int = 4) -> int:
    """Let standard output flow; return the size of its pipe."""
    for _ in range(pieces):
        fill(writer)
        await streams.stdout.read(LARGEST_READ, child)
    return fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)


async def test_a_pipe_is_large_while_its_stream_flows(bulk: Bulk) -> None:
    pipes = Pipes(bulk=bulk)
    writer = os.dup(pipes.child_ends.stdout)
    streams, child = pipes.started(), running_child()
    assert await flow(streams, writer, child, 1) == 4 * PIPE  # it may have been all of it
    assert await flow(streams, writer, child) == 16 * PIPE
    assert fcntl.fcntl(streams.stderr._fd, fcntl.F_GETPIPE_SZ) == PIPE
    os.write(writer, b"little")
    assert await streams.stdout.read(LARGEST_READ, child) == b"little"
    assert fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) == 4 * PIPE
    assert [bulk.take_pipe() for _ in range(3)] == [True, True, False]
    streams.close()
    os.close(writer)


@pytest.mark.parametrize(
    ("other", "idle", "most"),
    [(True, IDLE, 16 * PIPE), (True, IDLE * 0.9, 4 * PIPE), (False, 0, 16 * PIPE)],
    ids=["others are idle", "one is not", "its own input"],
)
async def test_beside_other_processes_a_read_is_no_larger_than_before(
    other: bool, idle: float, most: int, bulk: Bulk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An echo would have to wait until a large piece is read and sent."""
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pipes, (theirs, ours) = Pipes(bulk=bulk), os.pipe()
    writer, stdin = os.dup(pipes.child_ends.stdout), Input(ours, bulk)
    streams, child = pipes.started(), running_child()
    await flow(streams, writer, child)
    now += 2 * IDLE
    fill(writer)
    await stdin.write(b"x", running_child() if other else child)
    now += 1.01 * idle
    assert len(await streams.stdout.read(LARGEST_READ, child)) == most
    streams.close()
    stdin.release()
    for end in (writer, theirs):
        os.close(end)


async def test_only_so_many_pipes_are_large_at_once(bulk: Bulk) -> None:
    all_pipes = [Pipes(bulk=bulk) for _ in range(4)]
    writers = [os.dup(pipes.child_ends.stdout) for pipes in all_pipes]
    streams = [pipes.started() for pipes in all_pipes]
    found = [await flow(one, writer, running_child()) for one, writer in zip(streams, writers, strict=True)]
    assert found == [16 * PIPE, 16 * PIPE, 4 * PIPE, 4 * PIPE]
    streams[0].close()
    assert await flow(streams[3], writers[3], running_child()) == 16 * PIPE
    for one, writer in zip(streams, writers, strict=True):
        one.close()
        os.close(writer)
    assert [bulk.take_pipe() for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(("memory", "size"), [(None, 16), (0, 16), (-1, 16), (128 << 20, 16), (64 << 20, 4)])
async def test_a_container_of_little_memory_has_no_large_pipes(memory: int | None, size: int, bulk: Bulk) -> None:
    pipes = Pipes(memory=memory, bulk=bulk)
    writer = os.dup(pipes.child_ends.stdout)
    streams = pipes.started()
    assert await flow(streams, writer, running_child()) == size * PIPE
    streams.close()
    os.close(writer)


async def test_a_kernel_that_grants_no_large_pipe_leaves_it_to_others(
    bulk: Bulk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdio, "LARGE_PIPE", 1 << 30)
    pipes = Pipes(bulk=bulk)
    writer = os.dup(pipes.child_ends.stdout)
    streams = pipes.started()
    assert await flow(streams, writer, running_child()) == 4 * PIPE
    assert [bulk.take_pipe() for _ in range(3)] == [True, True, False]
    streams.close()
    os.close(writer)


async def test_long_input_gets_a_large_pipe_while_it_flows(bulk: Bulk) -> None:
    theirs, ours = os.pipe()
    stdin, child = Input(ours, bulk), running_child()
    assert await stdin.write(bytes(12 * PIPE), child) == 12 * PIPE  # nobody needs to read
    assert fcntl.fcntl(ours, fcntl.F_GETPIPE_SZ) == 16 * PIPE
    os.read(theirs, 12 * PIPE)
    assert await stdin.write(b"little", child) == 6
    assert fcntl.fcntl(ours, fcntl.F_GETPIPE_SZ) == 4 * PIPE
    assert [bulk.take_pipe() for _ in range(3)] == [True, True, False]
    await stdin.close()
    os.close(theirs)


async def test_a_stream_that_flows_is_read_when_more_has_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caisson.agent.model.stdio.GATHER", 0.3)

    ours, theirs = os.pipe()
    output, child = Output(ours), running_child()
    page = bytes(PAGE)
    os.write(theirs, page)
    assert await output.read(LARGEST_READ, child) == page  # the first one does not wait for more
    for _ in range(2):
        read = await pending(output.read(LARGEST_READ, child))
        for _ in range(3):
            os.write(theirs, page)
            for _ in range(5):
                await asyncio.sleep(0)
        assert await read == 3 * page
    read = await pending(output.read(LARGEST_READ, child))
    os.write(theirs, page)
    for _ in range(5):
        await asyncio.sleep(0)
    read.cancel()  # while it collects
    await asyncio.wait([read])
    os.write(theirs, page)
    child._end(0)
    assert await read_all(output, child) == 2 * page
    os.close(theirs)


async def test_a_terminal_that_flows_is_read_in_more_than_the_kernels_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caisson.agent.model.stdio.GATHER", 0.3)
    master, slave = os.openpty()
    tty.setraw(slave)
    streams, child = Streams.of_terminal(master), running_child()
    os.write(slave, b"a" * 10)
    assert await streams.stdout.read(LARGEST_READ, child) == b"a" * 10  # somebody is typing
    os.write(slave, bytes(3000))
    read = await pending(streams.stdout.read(9000, child))
    for _ in range(2):
        os.write(slave, bytes(3000))
    assert len(await read) == 9000
    os.write(slave, bytes(2000))
    read = await pending(streams.stdout.read(9000, child))
    read.cancel()  # while it collects
    await asyncio.wait([read])
    os.close(slave)
    child._end(0)
    assert len(await read_all(streams.stdout, child)) == 2000
    streams.close()


async def test_a_stream_of_small_pieces_waits_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caisson.agent.model.stdio.GATHER", 3600)

    ours, theirs = os.pipe()
    output, child = Output(ours), running_child()
    for _ in range(3):
        read = await pending(output.read(LARGEST_READ, child))
        os.write(theirs, bytes(PAGE - 1))
        assert len(await read) == PAGE - 1
    os.close(theirs)
    assert await read_all(output, child) == b""


async def test_a_kernel_that_grants_no_larger_pipe_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(pipe: int, size: int) -> bool:
        asked.append(size)
        return False

    monkeypatch.setattr("caisson.agent.model.stdio.resize_pipe", refuse)

    pipes = Pipes()
    writer = os.dup(pipes.child_ends.stdout)
    streams, child = pipes.started(), running_child()
    for _ in range(3):
        fill(writer)
        assert len(await streams.stdout.read(LARGEST_READ, child)) == PIPE
    assert asked == [BULK_PIPE]
    streams.close()
    os.close(writer)

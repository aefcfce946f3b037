"""Test tasks' streams and events: FIFOs, files, logging programs, terminals; and containerd temporarily away."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.shim.fake_containerd import FakeContainerd, Fifo

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

LOGGER = f"""#!{sys.executable}
import os, sys, threading
place = os.environ["CONTAINER_NAMESPACE"] + " " + os.environ["CONTAINER_ID"] + " " + " ".join(sys.argv[1:])
read = lambda fd: b"".join(iter(lambda: os.read(fd, 4096), b""))
os.close(5)
out, err = read(3), read(4)
open(sys.argv[2], "w").write(f"{{place}}: {{out!r}} {{err!r}}")
"""


async def test_output_comes_by_two_fifos_that_end_with_the_process(fake: FakeContainerd) -> None:
    out, err = (Fifo(fake.place / name, os.O_RDONLY) for name in ("out", "err"))
    task = await fake.start("c1", "sh", "-c", "echo out; echo err >&2; head -c 300000 /dev/zero")
    await task.create(stdout=out.path, stderr=err.path)
    state = await task.call("State")
    assert (state.stdout, state.stderr, state.stdin) == (out.path, err.path, "")
    await task.call("Start")
    texts = await asyncio.gather(out.read(), err.read())
    assert list(texts) == [b"out\n" + bytes(300_000), b"err\n"]
    await task.call("Wait")
    await task.call("Delete")
    await task.call("Shutdown")
    out.close()
    err.close()


async def test_input_ends_by_close_io_alone(fake: FakeContainerd) -> None:
    out, into = Fifo(fake.place / "out", os.O_RDONLY), Fifo(fake.place / "in", os.O_RDWR)
    task = await fake.start("c1", "cat")
    await task.create(stdin=into.path, stdout=out.path)
    await task.call("Start")
    for text in (b"one\n", b"two\n"):  # a client that left may return
        client = os.open(into.path, os.O_WRONLY)
        os.write(client, text)
        os.close(client)
        assert await out.read_some() == text
    into.close()
    await task.call("CloseIO", stdin=True)
    assert await out.read() == b""
    assert (await task.call("Wait")).exit_status == 0
    await task.call("Delete")
    await task.call("Shutdown")
    out.close()


async def test_input_is_opened_when_containerd_knows_the_task(fake: FakeContainerd) -> None:
    """A client that has nothing to send opens it and calls CloseIO, once."""
    out, path = Fifo(fake.place / "out", os.O_RDONLY), fake.place / "in"
    os.mkfifo(path)
    task = await fake.start("c1", "cat")
    await task.create(stdin=str(path), stdout=out.path)
    with pytest.raises(OSError, match="No such device or address"):  # fifo(7): ENXIO, nobody reads
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    await task.call("Start")
    client = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.write(client, b"all\n")
    os.close(client)
    await task.call("CloseIO", stdin=True)
    assert await out.read() == b"all\n"
    await task.call("Wait")
    await task.call("Delete")
    await task.call("Shutdown")
    out.close()


@pytest.mark.parametrize("gone", [False, True])
async def test_input_that_ended_before_the_start_is_none(fake: FakeContainerd, gone: bool) -> None:
    out, path = Fifo(fake.place / "out", os.O_RDONLY), fake.place / "in"
    os.mkfifo(path)
    task = await fake.start("c1", "cat")
    await task.create(stdin=str(path), stdout=out.path)
    if gone:
        path.unlink()
    else:
        await task.call("CloseIO", stdin=True)
    await task.call("Start")
    assert await out.read() == b""
    assert (await task.call("Wait")).exit_status == 0
    await task.call("Delete")
    await task.call("Shutdown")
    out.close()


async def test_without_stdin_a_process_reads_end_of_file(fake: FakeContainerd) -> None:
    task = await fake.start("c1", "sh", "-c", "cat; exec sleep 1000")
    await task.create()
    await task.call("Start")
    await task.exec("e1", "cat")
    assert (await task.call("Wait", exec_id="e1")).exit_status == 0
    await task.exec("e2", "sh", "-c", "until grep -q sleep /proc/1/cmdline; do sleep 0.1; done")
    assert (await task.call("Wait", exec_id="e2")).exit_status == 0
    await task.end()


async def test_a_terminal_is_one_stream_and_has_a_size(fake: FakeContainerd) -> None:
    out, into = Fifo(fake.place / "out", os.O_RDONLY), Fifo(fake.place / "in", os.O_RDWR)
    task = await fake.run("c1", "sleep", "1000")
    await task.call("ResizePty", width=1, height=1)  # no-op without a terminal
    words = ("sh", "-c", "tty >&2; read line; stty size; echo $line")
    await task.exec("e1", *words, terminal=True, stdin=into.path, stdout=out.path)
    assert await out.read_some() == b"/dev/pts/0\r\n"
    await task.call("ResizePty", exec_id="e1", width=111, height=37)
    os.write(into.fd, b"go\n")
    assert (await out.read()).replace(b"\r\n", b"\n") == b"go\n37 111\ngo\n"
    assert (await task.call("State", exec_id="e1")).terminal
    await task.call("Delete", exec_id="e1")
    await task.end()
    for fifo in (out, into):
        fifo.close()


async def test_an_exec_that_fails_closes_its_fifos_before_it_answers(fake: FakeContainerd) -> None:
    out = Fifo(fake.place / "out", os.O_RDONLY)
    task = await fake.run("c1", "sleep", "1000")
    await task.add("e1", "nosuch", stdout=out.path)
    await task.refused("Start", exec_id="e1")
    assert await out.read() == b""
    await task.call("Delete", exec_id="e1")
    await task.end()
    out.close()


async def test_an_end_is_told_while_a_child_holds_the_output(fake: FakeContainerd) -> None:
    out = Fifo(fake.place / "out", os.O_RDONLY)
    task = await fake.run("c1", "sleep", "1000")
    await task.exec("e1", "sh", "-c", "sleep 1000 & echo here", stdout=out.path)
    async with asyncio.timeout(20):
        await task.call("Wait", exec_id="e1")
    assert await out.read_some() == b"here\n"
    await task.end()
    out.close()


async def test_nobody_need_want_output(fake: FakeContainerd) -> None:
    task = await fake.run("c1", "sh", "-c", "head -c 3000000 /dev/zero; exit 4")
    assert (await task.call("Wait")).exit_status == 4
    await task.call("Delete")
    await task.call("Shutdown")


async def test_output_is_appended_to_a_file(fake: FakeContainerd) -> None:
    log = fake.place / "log"
    log.write_text("before\n")
    task = await fake.start("c1", "sh", "-c", "echo out; sleep 0.2; echo err >&2")
    await task.create(stdout=f"file://{log}", stderr=f"file://{log}")
    await task.call("Start")
    await task.call("Wait")
    await task.call("Delete")
    assert log.read_text() == "before\nout\nerr\n"
    await task.call("Shutdown")


async def test_a_logging_program_gets_both_streams(fake: FakeContainerd) -> None:
    program, written = fake.place / "logger", fake.place / "written"
    program.write_text(LOGGER)
    program.chmod(0o755)
    task = await fake.start("c1", "sh", "-c", "echo out; echo err >&2")
    url = f"binary://{program}?to={written}"
    await task.create(stdout=url, stderr=url)
    await task.call("Start")
    await task.call("Wait")
    await task.call("Delete")
    assert written.read_text() == f"tests c1 to {written}: b'out\\n' b'err\\n'"
    await task.call("Shutdown")


async def test_a_logging_program_that_does_not_exist_fails_the_create(fake: FakeContainerd) -> None:
    task = await fake.start("c1", "true")
    _, text = await task.refused("Create", bundle=str(task.bundle), stdout="binary:///nonexistent")
    assert "/nonexistent" in text
    await task.call("Shutdown")


async def test_events_wait_for_a_containerd_that_is_restarted(fake: FakeContainerd) -> None:
    task = await fake.run("c1", "sleep", "1000")
    await fake.until(lambda: fake.topics("c1") == ["create", "start"])
    await fake.close()
    await task.exec("e1", "true")
    await task.call("Wait", exec_id="e1")
    await fake.listen()
    await fake.until(lambda: fake.topics("c1")[2:] == ["exec-added e1", "exec-started e1", "exit e1"])
    await task.end()
    await fake.until(lambda: fake.topics("c1")[5:] == ["exit", "delete"])


async def test_start_prints_what_each_containerd_understands(fake: FakeContainerd) -> None:
    task = await fake.start("c1", "true", version=2)
    assert task.address == (task.bundle / "address").read_text()
    assert Path(task.address.removeprefix("unix://")).stat().st_mode & 0o777 == 0o600
    again = await fake.run_shim(task.bundle, "start")
    assert again.decode() == task.address, "a shim that already serves the container must not be restarted"
    await task.call("Shutdown")

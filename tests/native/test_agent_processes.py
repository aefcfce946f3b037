"""Test processes over the real API on this machine: exits, streams, signals."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from caisson.agent.client import Agent, AgentError, Container, ProgramError
from caisson.agent.rpc.codes import StatusCode
from caisson.proto.kata1 import agent_pb2, oci_pb2
from tests.native.agent_support import RunningAgent, errors, output, refused, sh
from tests.support.poll import until

pytestmark = pytest.mark.root

#: An init that exits with the number of the first signal in its queue.
QUEUE = """
#include <signal.h>
#include <unistd.h>
int main(void) {
    sigset_t set;
    int number;
    sigfillset(&set);
    sigprocmask(SIG_BLOCK, &set, 0);
    write(1, "ready\\n", 6);
    sigwait(&set, &number);
    return number;
}
"""


async def started(agent: Agent, running: RunningAgent, *args: str) -> Container:
    """Start a container in a sandbox."""
    await agent.create_sandbox()
    return await agent.ensure_container("box", running.spec(*args))


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("kill -SEGV $$", 139)],
)
async def test_exit_status(agent: RunningAgent, script: str, status: int) -> None:
    async with agent.connect() as client:
        process = await sh(await started(client, agent), script)
        assert await process.wait() == status
        assert await process.wait() == status  # the status is kept for late callers


async def test_streams_are_separate_and_complete(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        process = await sh(await started(client, agent), "head -c 1000000 /dev/zero; echo err >&2; exit 3")
        out, err = await asyncio.gather(output(process), errors(process))
        assert (len(out), err, await process.wait()) == (1_000_000, b"err\n", 3)


async def test_output_written_before_an_exit_nobody_saw_is_still_there(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        process = await sh(await started(client, agent), "echo early; echo late >&2")
        assert await process.wait() == 0
        assert (await output(process), await errors(process)) == (b"early\n", b"late\n")


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
async def test_a_background_job_does_not_hold_the_end(agent: RunningAgent, terminal: bool) -> None:
    async with agent.connect() as client:
        container = await started(client, agent)
        process = await sh(container, "trap '' HUP; sleep 1000 & echo started; exit 5", terminal=terminal)
        assert (await output(process)).strip() == b"started"
        assert await process.wait() == 5


async def test_a_background_job_that_writes_for_ever_does_not_hold_the_end(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        process = await sh(await started(client, agent), "yes & echo started; exit 5")
        assert b"started\n" in await output(process)
        assert await process.wait() == 5


async def test_a_slow_reader_slows_the_writer(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        process = await sh(await started(client, agent), "yes")
        stream = process.stdout()
        assert (await anext(stream)).startswith(b"y\ny\n")
        await asyncio.sleep(0.3)  # an agent that reads ahead would have read 100 MB by now
        status = agent.memory()
        assert status < 120_000_000, status
        await process.signal(signal.SIGKILL)
        assert await process.wait() == 137


async def test_stdin_reaches_the_program_byte_for_byte(agent: RunningAgent) -> None:
    data = random.Random(2).randbytes(20_000_000)

    async with agent.connect() as client:
        process = await (await started(client, agent)).exec(["/bin/sha256sum"])
        for start in range(0, len(data), 1 << 20):
            await process.write(data[start : start + (1 << 20)])
        await process.close_stdin()
        await process.close_stdin()
        assert (await output(process)).split()[0].decode() == hashlib.sha256(data).hexdigest()


async def test_writing_after_the_end(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        container = await started(client, agent)
        ended = await sh(container, "exit 0")
        await ended.wait()
        code, text = await refused(ended.write(b"x" * 100_000))
        assert (code, text) == (StatusCode.UNKNOWN, "write |1: broken pipe")
        closed = await container.exec(["/bin/sleep", "1000"])
        await closed.close_stdin()
        answer = await client.rpc.WriteStdin(
            agent_pb2.WriteStreamRequest(container_id="box", exec_id=closed.exec_id, data=b"x")
        )
        assert answer.len == 0


async def test_a_terminal_has_a_size_and_one_output(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        container = await started(client, agent)
        process = await sh(container, "read x; stty size; tty; echo err >&2; cat", terminal=True)
        await process.resize(33, 99)
        await process.write(b"go\n")
        await process.close_stdin()  # truncates nothing
        await process.write(b"\x04")
        text = await output(process)
        assert b"33 99" in text
        assert b"/dev/pts/" in text
        assert b"err" in text
        assert await process.wait() == 0
        plain = await container.exec(["/bin/sleep", "1000"])
        code, message = await refused(plain.resize(1, 1))
        assert code is StatusCode.FAILED_PRECONDITION
        assert message == "Terminal is not set, impossible to resize it"


async def test_many_waiters_before_and_after(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        process = await sh(await started(client, agent), "read x; exit 4")
        waiters = [asyncio.create_task(process.wait()) for _ in range(10)]
        await process.write(b"\n")
        assert await asyncio.gather(*waiters) == [4] * 10
        assert await process.wait() == 4


async def test_a_cancelled_wait_or_read_loses_nothing(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        process = await sh(await started(client, agent), "read x; echo out; exit 4")
        for pending in (process.wait(), anext(process.stdout())):
            task = asyncio.ensure_future(pending)
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await process.write(b"\n")
        assert await output(process) == b"out\n"
        assert await process.wait() == 4


@pytest.mark.parametrize(
    ("program", "text", "status"),
    [
        ("no-such-program", 'exec: "no-such-program": executable file not found in $PATH', 127),
        ("/bin/no-such-program", "no such file or directory", 127),
        ("/etc/passwd", "permission denied", 126),
    ],
)
async def test_programs_that_cannot_run(agent: RunningAgent, program: str, text: str, status: int) -> None:
    async with agent.connect() as client:
        container = await started(client, agent)
        with pytest.raises(ProgramError) as caught:
            await container.exec([program], env=["PATH=/bin"])
        assert text in caught.value.details
        assert (caught.value.exit_status, caught.value.code) == (status, StatusCode.INTERNAL)


async def test_signals(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        container = await started(client, agent)
        process = await sh(container, "trap 'echo told; exit 6' USR1; echo ready; while :; do sleep 0.01; done")
        stream = process.stdout()
        assert await anext(stream) == b"ready\n"
        await process.signal(signal.SIGUSR1)
        assert await anext(stream) == b"told\n"
        assert await process.wait() == 6
        await process.signal(signal.SIGKILL)  # too late, but not an error
        assert (await refused(process.signal(4000)))[0] is StatusCode.INVALID_ARGUMENT


async def test_term_ends_an_init_without_a_handler_and_a_handler_is_asked(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        plain = await client.ensure_container("plain", agent.spec("/bin/sleep", "1000"))
        await plain.init().signal(signal.SIGTERM)
        assert await plain.init().wait() == 137
        script = "trap 'exit 8' TERM; echo ready; while :; do sleep 0.01; done"
        polite = await client.ensure_container("polite", agent.spec("/bin/sh", "-c", script))
        assert await anext(polite.init().stdout()) == b"ready\n"
        await polite.init().signal(signal.SIGTERM)
        assert await polite.init().wait() == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_that_an_init_ignores_does_not_end_it(agent: RunningAgent, number: int) -> None:
    async with agent.connect() as client:
        script = "trap '' TERM INT; echo ready; read x; exit 8"
        process = (await started(client, agent, "/bin/sh", "-c", script)).init()
        assert await anext(process.stdout()) == b"ready\n"
        await process.signal(number)
        await process.write(b"\n")
        assert await process.wait() == 8


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    """Provide a directory containing that program as `init`."""
    tmp_path.chmod(0o755)
    (tmp_path / "init.c").write_text(QUEUE)
    subprocess.run(["musl-gcc", "-static", "-o", tmp_path / "init", tmp_path / "init.c"], check=True)
    return tmp_path


async def test_an_init_that_blocks_signals_gets_them_from_its_queue(agent: RunningAgent, queue: Path) -> None:
    """Such inits forward signals to their only child: SIGKILL would kill it unnoticed."""
    async with agent.connect() as client:
        await client.create_sandbox()
        spec = agent.spec("/mnt/init")
        spec.Mounts.append(oci_pb2.Mount(destination="/mnt", type="bind", source=str(queue), options=["rbind"]))
        process = (await client.ensure_container("box", spec)).init()
        assert await anext(process.stdout()) == b"ready\n"
        await process.signal(signal.SIGTERM)
        assert await process.wait() == signal.SIGTERM


async def test_interrupt_ends_an_init_that_leaves_it_to_the_kernel(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        plain = await client.ensure_container("plain", agent.spec("/bin/sleep", "1000"))
        await plain.init().signal(signal.SIGINT)
        assert await plain.init().wait() == 137
        script = "trap '' INT; echo ready; read x; exit 8"
        deaf = await client.ensure_container("deaf", agent.spec("/bin/sh", "-c", script))
        assert await anext(deaf.init().stdout()) == b"ready\n"
        await deaf.init().signal(signal.SIGINT)
        await deaf.init().write(b"\n")
        assert await deaf.init().wait() == 8


def runs(agent: RunningAgent, program: str) -> Callable[[], bool]:
    """Return whether one of the agent's children is running this program by now."""
    return lambda: program in {Path(f"/proc/{pid}/comm").read_text().strip() for pid in agent.children()}


async def test_interrupt_typed_at_a_terminal_ends_such_an_init_too(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        for name, script, program, status in (
            ("cooked", "echo ready; exec sleep 1000", "sleep", 137),
            ("raw", "stty -isig -icanon; echo ready; read x; exit 8", "sh", 8),
            ("deaf", "trap '' INT; echo ready; read x; exit 8", "sh", 8),
        ):
            container = await client.ensure_container(name, agent.spec("/bin/sh", "-c", script, terminal=True))
            process = container.init(terminal=True)
            stream = process.stdout()
            while b"ready" not in await anext(stream):
                pass
            await until(runs(agent, program), f"{program}: a shell that will be it still handles the signal")
            await process.write(b"\x03")
            with contextlib.suppress(AgentError):  # it has exited
                await process.write(b"\n")
            assert await process.wait() == status, name


async def test_signal_to_all(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        container = await started(client, agent)
        processes = [await container.exec(["/bin/sleep", "1000"]) for _ in range(3)]
        await container.signal(signal.SIGKILL)
        assert [await process.wait() for process in processes] == [137] * 3
        assert await container.init().wait() == 137


async def test_three_hundred_execs_leave_no_descriptor_and_no_zombie(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        container = await started(client, agent)

        async def one(number: int) -> None:
            process = await sh(container, f"echo {number}; exit {number % 5}")
            assert await output(process) == f"{number}\n".encode()
            assert await errors(process) == b""
            assert await process.wait() == number % 5

        await one(0)
        fds, children = agent.fds(), agent.children()
        for batch in range(15):
            await asyncio.gather(*(one(batch * 20 + number) for number in range(20)))
        await until(lambda: agent.fds() <= fds and agent.children() == children, "everything is released")


async def test_orphans_are_reaped(agent: RunningAgent) -> None:
    async with agent.connect() as client:
        container = await started(client, agent)
        before = agent.children()
        process = await sh(container, "(sleep 0.1 & ) ; exit 0")
        assert await process.wait() == 0
        await until(lambda: agent.children() == before, "all processes have exited")


async def test_a_home_is_of_the_passwd_that_the_container_has_mounted(agent: RunningAgent, tmp_path: Path) -> None:
    above, below = tmp_path / "above", agent.rootfs / "etc/passwd"
    above.mkdir()
    (above / "passwd").write_text("who:x:7:7::/above:/bin/sh\n")
    plain = below.read_text()
    below.write_text(f"{plain}who:x:7:7::/below:/bin/sh\n")
    try:
        async with agent.connect() as client:
            await client.create_sandbox()
            spec = agent.spec("/bin/sleep", "1000")
            bare = await client.create_container("bare", spec)
            await bare.start()
            spec.Mounts.add(destination="/etc", type="bind", source=str(above), options=["bind"])
            mounted = await client.create_container("mounted", spec)
            await mounted.start()
            for container, expected in ((bare, b"/below\n"), (mounted, b"/above\n")) * 2:
                process = await container.exec(["/bin/sh", "-c", "echo $HOME"], env=["PATH=/bin"], uid=7, gid=7)
                assert await output(process) == expected
    finally:
        below.write_text(plain)  # in a root shared with other tests

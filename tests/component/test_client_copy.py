"""Test the command line's cp with a fake agent: what it sends and imports, overlapping calls, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from caisson.agent.client.caller import CHUNK, INPUT_CHUNK
from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata3 import agent_pb2
from tests.component.test_client_execute import HEAVY, ok, output, pretended, status

#: The command without a VM: the socket is its argument.
COMMAND = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from caisson.agent.client.copy import copy
from caisson.agent.client.errors import AgentError, ClientError
machine = SimpleNamespace(agent_socket=Path(sys.argv[1]), directory=Path(sys.argv[1]).parent)
try:
    copy(machine, *sys.argv[3:])
    status = 0
except (AgentError, ClientError) as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    status = 99
except KeyboardInterrupt:
    status = 130
print(*sorted(sys.modules), sep="\\n", file=open(sys.argv[2], "w"))
sys.stderr.flush()
os._exit(status)
"""

#: Needed by tarfile, and by Path.
NEEDED = {"json", "typing"}

Answer = Callable[[bytes], bytes | None]
QUIET: dict[str, Answer] = {"ReadStderr": output(), "WaitProcess": status(0), "SignalProcess": ok, "WriteStdin": ok}


def cp(words: list[str], *more: str) -> list[str]:
    """Return the words of a cp, from those of an exec."""
    return [words[0], "-c", COMMAND, *words[3:], *more]


def contents(payloads: list[bytes]) -> bytes:
    return b"".join(agent_pb2.WriteStreamRequest.FromString(one).data for one in payloads)


def test_a_file_goes_in_and_little_is_imported(tmp_path: Path) -> None:
    data = os.urandom(3 * INPUT_CHUNK + 5)
    (tmp_path / "file").write_bytes(data)
    with pretended(tmp_path, **QUIET) as (agent, words):
        subprocess.run(cp(words, str(tmp_path / "file"), "box:/there"), check=True, timeout=60)
        (started,) = agent.wait_for("ExecProcess")
        archive = contents(agent.wait_for("WriteStdin"))
        agent.wait_for("CloseStdin")
    request = caisson_pb2.ExecProcessRequest.FromString(started)
    document = json.loads(request.process)
    assert request.container_id == "box"
    assert (document["args"][:2], document["env"][1:]) == (["sh", "-c"], ["LC_ALL=C"])
    assert len(archive) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(archive)) as read:
        (member,) = read
        inner = read.extractfile(member)
        assert inner is not None and (member.name, inner.read()) == ("x", data)
    assert not set((tmp_path / "modules").read_text().split()) & (HEAVY - NEEDED)


def archive_of(name: str, data: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        made.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def test_a_file_comes_out_and_is_read_ahead(tmp_path: Path) -> None:
    """The third piece is requested before the second one is answered."""
    data = os.urandom(3 * CHUNK)
    archive = archive_of("./file", data)
    left = [archive[at : at + CHUNK] for at in range(0, len(archive), CHUNK)]
    asked = threading.Semaphore(0)

    def read(_: bytes) -> bytes:
        asked.release()
        piece = left.pop(0) if left else b""
        if len(left) == 2:  # the second of four pieces
            assert all(asked.acquire(timeout=30) for _ in range(3))
        return agent_pb2.ReadStreamResponse(data=piece).SerializeToString()

    with pretended(tmp_path, **QUIET, ReadStdout=read) as (_, words):
        subprocess.run(cp(words, "box:/file", str(tmp_path / "file")), check=True, timeout=60)
    assert (tmp_path / "file").read_bytes() == data


def test_input_is_sent_ahead_of_the_answers(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(4 * INPUT_CHUNK))
    begun = threading.Semaphore(0)

    def write(_: bytes) -> bytes:
        begun.release()
        return b""

    def first(_: bytes) -> bytes:
        agent.answers["WriteStdin"] = write
        assert begun.acquire(timeout=30)  # the second one arrives before this one is answered
        return b""

    with pretended(tmp_path, **QUIET | {"WriteStdin": first}) as (agent, words):
        subprocess.run(cp(words, str(tmp_path / "file"), "box:/there"), check=True, timeout=60)


@pytest.mark.parametrize("way", ["in", "out"])
@pytest.mark.parametrize("stubborn", [False, True])
def test_interrupted_it_stops_the_process(tmp_path: Path, way: str, stubborn: bool) -> None:
    (tmp_path / "file").write_bytes(bytes(64 * INPUT_CHUNK))
    stopped = threading.Event()

    def end(_: bytes) -> bytes | None:
        if not stubborn:
            stopped.set()
        return None if stubborn else b""

    def wait(_: bytes) -> bytes:
        assert stopped.wait(30)
        return agent_pb2.WaitProcessResponse(status=1).SerializeToString()

    def kill(payload: bytes) -> bytes:
        if agent_pb2.SignalProcessRequest.FromString(payload).signal == signal.SIGKILL:
            stopped.set()
        return b""

    answers: dict[str, Answer] = {
        "WriteStdin": lambda _: None,
        "ReadStdout": lambda _: None,
        "ReadStderr": lambda _: None,
        "CloseStdin": end,
        "WaitProcess": wait,
        "SignalProcess": kill,
    }
    locations = (str(tmp_path / "file"), "box:/x") if way == "in" else ("box:/x", str(tmp_path / "back"))
    with pretended(tmp_path, **answers) as (agent, words):
        with subprocess.Popen(cp(words, *locations)) as command:
            agent.wait_for("WriteStdin" if way == "in" else "ReadStdout")
            command.send_signal(signal.SIGINT)
            assert command.wait(30) == 130
        sent = [agent_pb2.SignalProcessRequest.FromString(one).signal for one in agent.wait_for("SignalProcess")]
        assert sent == [signal.SIGTERM, signal.SIGKILL] if stubborn else [signal.SIGTERM]
        agent.wait_for("CloseStdin")
    assert not (tmp_path / "back").exists()


def test_interrupted_while_it_starts_it_finds_the_process(tmp_path: Path) -> None:
    not_yet = iter([b"gone"])
    answers: dict[str, Answer] = {"ExecProcess": lambda _: None, "SignalProcess": lambda _: next(not_yet, b"")}
    (tmp_path / "file").touch()
    with pretended(tmp_path, **QUIET | answers) as (agent, words):
        with subprocess.Popen(cp(words, str(tmp_path / "file"), "box:/x")) as command:
            agent.wait_for("ExecProcess")
            command.send_signal(signal.SIGINT)
            assert command.wait(30) == 130
        assert len(agent.wait_for("SignalProcess")) == 2
        agent.wait_for("CloseStdin")


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ({"ExecProcess": lambda _: b"fail"}, "UsageError: cp: the container lacks `sh` or `tar`: no such program"),
        ({"ExecProcess": lambda _: b"end"}, "AgentGone: agent: does not answer (the connection is closed)"),
        (
            {"WriteStdin": lambda _: b"end", "WaitProcess": lambda _: None},
            "AgentGone: agent: does not answer (the connection is closed)",
        ),
        (
            {"ReadStderr": output(b"tar: full\n"), "WriteStdin": lambda _: b"gone", "WaitProcess": status(1)},
            "CopyError: tar: full",
        ),
        ({"WaitProcess": status(3)}, "CopyError: tar in the container: exited with status 3"),
    ],
)
def test_failures_are_reported(tmp_path: Path, answers: dict[str, Answer], text: str) -> None:
    (tmp_path / "file").touch()
    with pretended(tmp_path, **QUIET | answers) as (_, words):
        words = cp(words, str(tmp_path / "file"), "box:/x")
        done = subprocess.run(words, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr.decode().partition("; `")[0].strip()) == (99, text)


def test_an_archive_that_is_none_ends_the_process(tmp_path: Path) -> None:
    answers: dict[str, Answer] = {
        "ReadStdout": lambda _: agent_pb2.ReadStreamResponse(data=b"x" * CHUNK).SerializeToString(),
        "ReadStderr": lambda _: None,
    }
    with pretended(tmp_path, **QUIET | answers) as (agent, words):
        words = cp(words, "box:/x", str(tmp_path / "back"))
        done = subprocess.run(words, stderr=subprocess.PIPE, timeout=60)
        (sent,) = agent.wait_for("SignalProcess")
    assert agent_pb2.SignalProcessRequest.FromString(sent).signal == signal.SIGTERM
    assert b"CopyError: archive: the container sent a damaged header: " in done.stderr
    assert not (tmp_path / "back").exists()


def test_an_archive_without_an_end_is_refused_and_the_process_killed(tmp_path: Path) -> None:
    killed = threading.Event()

    def kill(payload: bytes) -> bytes:
        assert agent_pb2.SignalProcessRequest.FromString(payload).signal == signal.SIGKILL
        killed.set()
        return b""

    answers: dict[str, Answer] = {
        "ReadStdout": output(archive_of("./x", bytes(5000))[:1000]),
        "ReadStderr": output(then=killed),
        "WaitProcess": status(137),
        "SignalProcess": kill,
    }
    with pretended(tmp_path, **answers) as (_, words):
        words = cp(words, "box:/x", str(tmp_path / "back"))
        done = subprocess.run(words, stderr=subprocess.PIPE, timeout=60)
    assert done.stderr == b"CopyError: the container sent an invalid archive: unexpected end of data\n"
    assert not (tmp_path / "back").exists()

"""Test the command line's exec with a fake agent: streams, signals, and a lost connection."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc import frames
from caisson.agent.rpc.ttrpc.blocking import BlockingClient
from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata3 import agent_pb2
from caisson.proto.ttrpc import ttrpc_pb2

#: The command without a VM: the socket is its argument.
COMMAND = """
import sys
from pathlib import Path
from types import SimpleNamespace
from caisson.agent.client.errors import AgentGone, ProgramError
from caisson.agent.client.caller import OutputError
from caisson.agent.client.execute import execute
try:
    status = execute(SimpleNamespace(agent_socket=Path(sys.argv[1]), directory=Path("/nowhere")), "box", ["x\\udcff"])
except (AgentGone, OutputError, ProgramError) as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    status = 99
print(*sorted(sys.modules), sep="\\n", file=open(sys.argv[2], "w"))
sys.exit(status)
"""

#: Modules whose import would take longer than the whole command may.
HEAVY = {"asyncio", "google.protobuf", "grpc", "json", "socket", "threading", "typing"}


class Agent:
    """Answers calls from ``answers``; others wait.  Records requests."""

    def __init__(self, answers: dict[str, Callable[[bytes], bytes | None]]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, bytes]] = []
        self.seen = threading.Condition()
        self._sending = threading.Lock()

    def serve(self, listening: socket.socket) -> None:
        """Serve connections until the socket is shut down and they are closed."""
        served = []
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                served.append(threading.Thread(target=self.serve_connection, args=(connection,), daemon=True))
                served[-1].start()
        for thread in served:
            thread.join(30)

    def serve_connection(self, connection: socket.socket) -> None:
        reader = frames.FrameReader()
        answering = []
        with connection, suppress(ConnectionResetError):
            while data := connection.recv(1 << 16):
                reader.feed(data)
                while (frame := reader.next()) is not None:
                    request = ttrpc_pb2.Request.FromString(bytes(frame.data or b""))
                    with self.seen:
                        self.asked.append((request.method, request.payload))
                        self.seen.notify_all()
                    arguments = connection, frame.stream_id, request
                    answering.append(threading.Thread(target=self.answer, args=arguments, daemon=True))
                    answering[-1].start()
            for thread in answering:
                thread.join(30)

    def answer(self, connection: socket.socket, stream_id: int, request: ttrpc_pb2.Request) -> None:
        payload = answer(request.payload) if (answer := self.answers.get(request.method)) else None
        with self._sending, suppress(OSError):  # the command has exited
            if payload == b"end":
                connection.shutdown(socket.SHUT_RDWR)
            elif payload in REFUSALS:
                said = caisson_pb2.ErrorDetails(reason=REFUSALS[payload], text="no such program")
                detail = "caisson.ErrorDetails", said.SerializeToString()
                connection.sendall(frames.failure(stream_id, StatusCode.NOT_FOUND, "kata's", detail))
            elif payload is not None:
                connection.sendall(b"".join(frames.response(stream_id, [payload])))

    def wait_for(self, method: str, count: int = 1) -> list[bytes]:
        """Return the payloads of a method's calls, once there are as many."""
        with self.seen:
            assert self.seen.wait_for(lambda: sum(one == method for one, _ in self.asked) >= count, 30)
            return [payload for one, payload in self.asked if one == method]


#: Error responses.
REFUSALS = {b"fail": caisson_pb2.PROGRAM_NOT_FOUND, b"gone": caisson_pb2.CONTAINER_NOT_FOUND}


def output(*pieces: bytes, then: threading.Event | None = None) -> Callable[[bytes], bytes]:
    """Answer reads with these pieces, then with EOF."""
    left = list(pieces)

    def read(_: bytes) -> bytes:
        if left:
            return agent_pb2.ReadStreamResponse(data=left.pop(0)).SerializeToString()
        assert then is None or then.wait(30)
        return b""

    return read


def ok(_: bytes) -> bytes:
    return b""


def status(number: int) -> Callable[[bytes], bytes]:
    return lambda _: agent_pb2.WaitProcessResponse(status=number).SerializeToString()


ENDS = {"ExecProcess": ok, "CloseStdin": ok, "ReadStderr": output(), "ReadStdout": output(), "WaitProcess": status(9)}


@contextmanager
def pretended(tmp_path: Path, **answers: Callable[[bytes], bytes | None]) -> Iterator[tuple[Agent, list[str]]]:
    """Start a fake agent; return it and the words that run the command against it."""
    agent = Agent({**ENDS, **answers})
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "agent.sock"))
        listening.listen()
        thread = threading.Thread(target=agent.serve, args=(listening,), daemon=True)
        thread.start()
        yield agent, [sys.executable, "-c", COMMAND, str(tmp_path / "agent.sock"), str(tmp_path / "modules")]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(30)


def test_streams_and_status_pass_and_little_is_imported(tmp_path: Path) -> None:
    written = threading.Event()

    def write(payload: bytes) -> bytes:
        written.set()
        return agent_pb2.WriteStreamResponse().SerializeToString()

    answers = {
        "ReadStdout": output(b"out", b"put\n", then=written),
        "ReadStderr": output(b"oops\n"),
        "WriteStdin": write,
    }
    with pretended(tmp_path, **answers) as (agent, words):
        done = subprocess.run(words, input=b"hello", capture_output=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (9, b"output\n", b"oops\n")
        (started,) = agent.wait_for("ExecProcess")
        (fed,) = agent.wait_for("WriteStdin")
        request = caisson_pb2.ExecProcessRequest.FromString(started)
    assert agent_pb2.WriteStreamRequest.FromString(fed).data == b"hello"
    assert request.container_id == "box"
    assert json.loads(request.process)["args"] == ["x\udcff"]
    loaded = set((tmp_path / "modules").read_text().split())
    assert not loaded & HEAVY


def test_input_that_never_ends_does_not_hold_the_end(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        with pretended(tmp_path) as (_, words):
            assert subprocess.run(words, stdin=reading, timeout=60).returncode == 9
    finally:
        os.close(reading)
        os.close(writing)


def test_a_reader_that_leaves_is_a_broken_pipe(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    answers = {"ReadStdout": output(*[b"y\n"] * 100), "SignalProcess": ok}
    with pretended(tmp_path, **answers) as (agent, words):
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=writing, timeout=60)
        os.close(writing)
        assert done.returncode == 128 + signal.SIGPIPE
        (sent,) = agent.wait_for("SignalProcess")
    assert agent_pb2.SignalProcessRequest.FromString(sent).signal == signal.SIGPIPE


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    answers = {"ReadStdout": output(b"y\n"), "SignalProcess": ok}
    with pretended(tmp_path, **answers) as (_, words), Path("/dev/full").open("wb") as full:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 99
    assert os.strerror(errno.ENOSPC) in done.stderr.decode()


def test_signals_are_passed_on_and_the_third_request_to_stop_kills(tmp_path: Path) -> None:
    stopped = threading.Event()
    answers = {"ReadStdout": output(b"ready\n", then=stopped), "SignalProcess": ok}
    with pretended(tmp_path, **answers) as (agent, words):
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as command:
            assert command.stdout is not None
            assert command.stdout.readline() == b"ready\n"
            for count, number in enumerate((signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGINT), 1):
                command.send_signal(number)
                sent = agent.wait_for("SignalProcess", count)
            stopped.set()
            assert command.wait(60) == 9
    numbers = [agent_pb2.SignalProcessRequest.FromString(one).signal for one in sent]
    assert numbers == [signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGKILL]


def test_a_process_whose_container_is_removed_has_its_status(tmp_path: Path) -> None:
    with pretended(tmp_path, ReadStdout=lambda _: b"gone", WaitProcess=status(137)) as (_, words):
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (137, b"")


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ({"ExecProcess": lambda _: b"fail"}, "ProgramError: no such program"),
        ({"ExecProcess": lambda _: b"end"}, "AgentGone: agent: does not answer (the connection is closed)"),
        ({"ReadStdout": lambda _: b"end"}, "AgentGone: agent: does not answer (the connection is closed)"),
        ({"WaitProcess": lambda _: b"end"}, "AgentGone: agent: does not answer (the connection is closed)"),
    ],
)
def test_failures_are_said(tmp_path: Path, answers: dict[str, Callable[[bytes], bytes | None]], text: str) -> None:
    with pretended(tmp_path, **answers) as (_, words):
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 99
    assert text in done.stderr.decode()


def test_nobody_listens(tmp_path: Path) -> None:
    words = [sys.executable, "-c", COMMAND, str(tmp_path / "none"), str(tmp_path / "modules")]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)
    assert b"AgentGone: agent: does not answer (no such file or directory)" in done.stderr


class InterruptedSocket:
    """A client's socket: a signal arrives once a request was sent, and answered."""

    def __init__(self, connected: socket.socket, server: socket.socket, is_answered: threading.Event) -> None:
        self._socket = connected
        self._server = server
        self._is_answered = is_answered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def sendmsg(self, pieces: Sequence[bytes]) -> int:
        self._socket.sendmsg(pieces)
        self._server.sendall(frames.response(1, [])[0])
        assert self._is_answered.wait(10)
        raise KeyboardInterrupt


def test_an_interrupt_between_the_answer_and_the_end_of_its_request() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        is_answered = threading.Event()
        interrupted: Any = InterruptedSocket(ours, theirs, is_answered)
        client = BlockingClient(interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.post("grpc.Health", "Check", [b""], lambda _: is_answered.set())
        client.close()

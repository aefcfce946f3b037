"""Run a program in a container for a command line: its streams and exit status are the caller's.

In a running container this is one call, plus those for the program's streams.  There is no event loop: importing one
would take longer than everything else that the command does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from _queue import SimpleQueue
from _thread import start_new_thread
from functools import partial

from caisson.agent.base import json
from caisson.agent.client.caller import (
    DEFAULT,
    FORWARDED,
    INPUT_CHUNK,
    MAX_STOPS,
    OUTPUT_CHUNK,
    PATH,
    ROOT,
    STOPS,
    console_size,
    output_error,
    raw_terminal,
    status_of,
    terminal_env,
    terminal_size,
    write_all,
)
from caisson.agent.client.errors import (
    AgentError,
    AgentGone,
    Reason,
    agent_error,
    connection_error,
    explain_container_errors,
)
from caisson.agent.rpc import wire
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.blocking import BlockingClient, received_view, take
from caisson.agent.rpc.ttrpc.responses import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from caisson.agent.client.guest import Machine
    from caisson.agent.rpc.ttrpc.blocking import Deliver
    from caisson.agent.rpc.ttrpc.frames import Buffer, Frame

#: Reasons of the default container before its first use, or after its init process has exited.
NOT_THERE = (Reason.CONTAINER_NOT_FOUND, Reason.CONTAINER_STOPPED)

#: Seconds to look for a starting process that is not wanted any more, and between two attempts.
FIND_TIMEOUT = 1.0
FIND_INTERVAL = 0.05

#: The services to call.  Their requests begin with the ids of the container and the process.
GUEST, AGENT = "caisson.Guest", "grpc.AgentService"

#: Numbers of the fields that follow in requests, and of the one in a response; the same in all messages.
PROCESS = DATA = LENGTH = SIGNAL = ROWS = 3
COLUMNS = 4
RESPONSE_DATA = STATUS = 1


def execute(
    machine: Machine,
    container_id: str,
    words: Sequence[str],
    *,
    env: Sequence[str] = (),
    cwd: str = "/",
    user: Mapping[str, Any] = ROOT,
    terminal: bool = False,
) -> int:
    """Run a program in a running container (the VM's default one is created on first use); returns its exit status.

    Until the process has exited and its output has ended, the caller's streams are connected to it.  With a terminal,
    standard input is in raw mode meanwhile and its size is followed; it is always restored.  Signals are passed on, the
    third one to stop as SIGKILL; if the agent kills the process instead, the status is that of the signal.  When the
    reader of stdout or stderr goes away the process gets SIGPIPE, as in a pipeline, and the status is 141.

    Raises ContainerUnavailable if the container has exited or does not exist, ProgramError if the program cannot be
    run, OutputError if output cannot be written for another reason, and AgentGone.
    """
    document = {
        "args": list(words),
        "env": [PATH, *(["HOME=/root"] if user is ROOT else ()), *terminal_env(terminal), *env],
        "cwd": cwd,
        "user": dict(user),
        "terminal": terminal,
        **console_size(terminal),
    }
    process = _AttachedProcess(machine, container_id, terminal)
    try:
        with explain_container_errors(container_id):
            process.start(document)
        return process.attach()
    except KeyboardInterrupt:
        process.signal_once(signal.SIGKILL)  # nobody will attach to it
        raise
    finally:
        process.close()


def _make_default_container(machine: Machine) -> None:
    import asyncio

    from caisson.agent.client.guest import Guest

    async def make() -> None:
        async with Guest(machine) as guest:
            await guest.container()

    asyncio.run(make())


class ContainerProcess:
    """A process in a container.  Its calls block a thread, or deliver their responses on the connection's own."""

    def __init__(self, machine: Machine, container_id: str) -> None:
        self.exec_id = os.urandom(16).hex()
        self._machine = machine
        self._container_id = container_id
        self._client: BlockingClient | None = None
        self._may_run = self._runs = False

    def start(self, document: Mapping[str, Any], timeout: float | None = None) -> None:
        """Start it, within ``timeout`` seconds; the VM's default container is created on first use.

        Raises AgentError.
        """
        try:
            self._start(document, timeout)
        except AgentError as error:
            if self._container_id != DEFAULT or not (isinstance(error, AgentGone) or error.reason in NOT_THERE):
                raise
            _make_default_container(self._machine)
            self._start(document, timeout)  # with the same id, so that it cannot run twice

    def _start(self, document: Mapping[str, Any], timeout: float | None) -> None:
        self.connect()
        encoded = json.dumps(document).encode(errors="backslashreplace")  # not UTF-8: escaped lone surrogates
        self._may_run = True
        try:
            self.call("ExecProcess", (PROCESS, encoded), service=GUEST, timeout=timeout)
        except AgentError as error:
            self._may_run = error.code is StatusCode.DEADLINE_EXCEEDED
            raise
        self._runs = True

    def connect(self) -> None:
        """Make a new connection; calls on the old one end with AgentGone.  Raises AgentGone."""
        self._disconnect()
        try:
            self._client = BlockingClient.connect(self._machine.agent_socket)
        except OSError as error:
            raise connection_error((error.strerror or str(error)).lower()) from error

    def close(self) -> None:
        """Close the connection."""
        self._disconnect()

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.close()

    def call(
        self, method: str, *fields: tuple[int, int | str | bytes], service: str = AGENT, timeout: float | None = None
    ) -> bytes:
        """Call a method on it, with the fields that follow the process's key in the request.  Raises AgentError."""
        assert self._client is not None
        try:
            return self._client.call(service, method, self._request(*fields), timeout)
        except RpcError as error:
            raise agent_error(error) from error
        except ValueError as error:  # longer than ttrpc carries
            raise AgentError(StatusCode.RESOURCE_EXHAUSTED, str(error)) from error

    def post(self, method: str, deliver: Deliver, *fields: tuple[int, int], data: Buffer = b"") -> None:
        """Call a method without waiting for its response; ``data`` is the last field, and not copied.

        Raises AgentError.
        """
        assert self._client is not None
        head = self._request(*fields)
        pieces = [head + wire.prefix(DATA, len(data)), data] if data else [head]
        try:
            self._client.post(AGENT, method, pieces, deliver)
        except RpcError as error:
            raise agent_error(error) from error

    def _request(self, *fields: tuple[int, int | str | bytes]) -> bytes:
        return wire.encode(((1, self._container_id), (2, self.exec_id), *fields))

    def write(self, data: Buffer) -> None:
        """Write to its standard input, waiting until all of it is accepted.  Raises AgentError."""
        answers: SimpleQueue[Frame | None] = SimpleQueue()
        self.post("WriteStdin", answers.put, data=data)
        response(take(answers))

    def read(self, method: str) -> memoryview:
        """Read an output stream; empty at its end.  Raises AgentError."""
        answers: SimpleQueue[Frame | None] = SimpleQueue()
        self.post(method, answers.put, (LENGTH, OUTPUT_CHUNK))
        return output(take(answers), method)

    def signal(self, number: int, timeout: float | None = None) -> None:
        """Send it a signal.  Raises AgentError."""
        self.call("SignalProcess", (SIGNAL, number), timeout=timeout)

    def signal_once(self, number: int) -> None:
        """Send it a signal on a new connection, whatever the old one was doing; wait for it if it is being started."""
        deadline = time.monotonic() + FIND_TIMEOUT
        while self._may_run and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(AgentError):
                self.connect()
                self.signal(number, timeout=left)
                return
            if self._runs:  # no longer
                return
            time.sleep(FIND_INTERVAL)


class _AttachedProcess(ContainerProcess):
    """A process and the caller's streams.

    The main thread processes the events that other threads and signal handlers put into ``_events``.
    """

    def __init__(self, machine: Machine, container_id: str, terminal: bool) -> None:
        super().__init__(machine, container_id)
        self._terminal = terminal
        self._outputs = 1 if terminal else 2  # streams that have not ended
        self._stops: list[int] = []
        self._status: int | None = None
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def attach(self) -> int:
        """Connect the caller's streams to the process until it has exited and all its output is delivered."""
        with raw_terminal(0) if self._terminal else contextlib.nullcontext(), self._handling_signals():
            # Call it now: once the container is removed, the status is lost.
            self.post("WaitProcess", lambda frame: self._events.put(partial(self._exited, frame)))
            start_new_thread(self._feed, ())
            start_new_thread(self._copy, ("ReadStdout", 1))
            if not self._terminal:
                start_new_thread(self._copy, ("ReadStderr", 2))
            while self._outputs or self._status is None:
                take(self._events)()
        return self._status

    def _feed(self) -> None:
        """Copy standard input, in a thread, as not all files can be polled."""
        with contextlib.suppress(AgentError):  # it has exited or closed its input: unread input is not an error
            while data := _read_input():
                self.write(data)
            if not self._terminal:
                self.call("CloseStdin")

    def _copy(self, method: str, target: int) -> None:
        """Copy an output stream to its end, in a thread, as a slow reader must not block the other streams."""
        error: Exception | None = None
        try:
            while data := self.read(method):
                write_all(target, data)
        except (AgentError, OSError) as problem:
            error = problem
        self._events.put(partial(self._output_ended, error))

    def _output_ended(self, error: Exception | None) -> None:
        if isinstance(error, OSError):
            with contextlib.suppress(AgentError):
                self.signal(signal.SIGPIPE)
            if not isinstance(error, BrokenPipeError):
                raise output_error(error) from error
            self._status, self._outputs = 128 + signal.SIGPIPE, 0
            return
        if error is not None and not (isinstance(error, AgentError) and error.reason == Reason.CONTAINER_NOT_FOUND):
            raise error
        self._outputs -= 1

    def _exited(self, frame: Frame | None) -> None:
        self._status = status_of(exit_status(frame), self._stops)

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        """Pass on signals and the size of the caller's terminal to the process."""
        actions: dict[int, Callable[[], None]] = {number: partial(self._signalled, number) for number in FORWARDED}
        if self._terminal and os.isatty(0):
            self._resize()
            actions[signal.SIGWINCH] = self._resize
        before = {
            number: signal.signal(number, lambda *_, action=action: self._events.put(action))
            for number, action in actions.items()
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, number: int) -> None:
        if number in STOPS:
            self._stops.append(number)
        number = signal.SIGKILL if len(self._stops) >= MAX_STOPS else number
        with contextlib.suppress(AgentError):  # it has ended
            self.post("SignalProcess", ignore, (SIGNAL, number))

    def _resize(self) -> None:
        size = terminal_size()
        if size is not None:
            with contextlib.suppress(AgentError):
                self.post("TtyWinResize", ignore, (ROWS, size[0]), (COLUMNS, size[1]))


def ignore(_: object) -> None:
    """Ignore a response."""


def _read_input() -> bytes:
    try:
        return os.read(0, INPUT_CHUNK)
    except OSError:
        return b""


def response(frame: Frame | None) -> memoryview:
    """Return a delivered response.  Raises AgentError."""
    try:
        return received_view(frame)
    except RpcError as error:
        raise agent_error(error) from error


def output(frame: Frame | None, method: str) -> memoryview:
    """Return the data of a delivered response to a read, where they were received.  Raises AgentError."""
    data = _field(response(frame), RESPONSE_DATA, method)
    return data if isinstance(data, memoryview) else memoryview(b"")


def exit_status(frame: Frame | None) -> int:
    """Return the status in a delivered response of WaitProcess.  Raises AgentError."""
    status = _field(response(frame), STATUS, "WaitProcess")
    return status if isinstance(status, int) else 0


def _field(message: memoryview, number: int, method: str) -> int | memoryview | None:
    try:
        return wire.value_of(message, number)
    except wire.WireError:
        text = f"{method}: the answer is not a valid {method}Response"
        raise AgentError(StatusCode.INTERNAL, text) from None

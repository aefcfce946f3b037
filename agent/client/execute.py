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
    CHUNK,
    DEFAULT,
    FORWARDED,
    MAX_STOPS,
    PATH,
    ROOT,
    STOPS,
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
from caisson.agent.rpc.ttrpc.blocking import BlockingClient, received
from caisson.agent.rpc.ttrpc.responses import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from caisson.agent.client.guest import Machine
    from caisson.agent.rpc.ttrpc.frames import Frame

#: Reasons of the default container before its first use, or after its init process has exited.
NOT_THERE = (Reason.CONTAINER_NOT_FOUND, Reason.CONTAINER_STOPPED)

#: Seconds to look for a starting program after Ctrl-C, and between two attempts.
KILL_TIMEOUT = 1.0
KILL_INTERVAL = 0.05

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
    }
    if (size := terminal_size(terminal)) is not None:
        document["consoleSize"] = {"height": size[0], "width": size[1]}
    process = _ExecProcess(container_id, os.urandom(16).hex(), terminal)
    try:
        with explain_container_errors(container_id):
            try:
                process.start(machine, document)
            except AgentError as error:
                if container_id != DEFAULT or not (isinstance(error, AgentGone) or error.reason in NOT_THERE):
                    raise
                _make_default_container(machine)
                process.start(machine, document)  # with the same id, so that it cannot run twice
        return process.attach()
    except KeyboardInterrupt:
        process.kill()
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


class _ExecProcess:
    """A process, and its streams.

    The main thread processes the events that other threads and signal handlers put into ``_events``.
    """

    def __init__(self, container_id: str, exec_id: str, terminal: bool) -> None:
        self._client: BlockingClient | None = None
        self._key = ((1, container_id), (2, exec_id))
        self._terminal = terminal
        self._outputs = 1 if terminal else 2  # streams that have not ended
        self._stops: list[int] = []
        self._status: int | None = None
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def start(self, machine: Machine, document: dict[str, Any]) -> None:
        """Start it.  Raises AgentError."""
        self.close()
        try:
            self._client = BlockingClient.connect(machine.agent_socket)
        except OSError as error:
            raise connection_error((error.strerror or str(error)).lower()) from error
        encoded = json.dumps(document).encode(errors="backslashreplace")  # not UTF-8: escaped lone surrogates
        self._call("ExecProcess", (PROCESS, encoded), service=GUEST)

    def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            self._client.close()

    def kill(self) -> None:
        """Kill it while it may still be starting: nobody will attach to it."""
        deadline = time.monotonic() + KILL_TIMEOUT
        while self._client is not None and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(AgentError):
                self._call("SignalProcess", (SIGNAL, signal.SIGKILL), timeout=left)
                return
            time.sleep(KILL_INTERVAL)

    def attach(self) -> int:
        """Connect the caller's streams to the process until it has exited and all its output is delivered."""
        with raw_terminal(0) if self._terminal else contextlib.nullcontext(), self._handling_signals():
            # Call it now: once the container is removed, the status is lost.
            self._post("WaitProcess", lambda frame: self._events.put(partial(self._exited, frame)))
            start_new_thread(self._feed, ())
            start_new_thread(self._copy, ("ReadStdout", 1))
            if not self._terminal:
                start_new_thread(self._copy, ("ReadStderr", 2))
            while self._outputs or self._status is None:
                self._events.get()()
        return self._status

    def _request(self, *fields: tuple[int, int | str | bytes]) -> bytes:
        return wire.encode((*self._key, *fields))

    def _call(
        self, method: str, *fields: tuple[int, int | str | bytes], service: str = AGENT, timeout: float | None = None
    ) -> bytes:
        """Call a method on the process.  Raises AgentError."""
        assert self._client is not None
        try:
            return self._client.call(service, method, self._request(*fields), timeout)
        except RpcError as error:
            raise agent_error(error) from error
        except ValueError as error:  # longer than ttrpc carries
            raise AgentError(StatusCode.RESOURCE_EXHAUSTED, str(error)) from error

    def _feed(self) -> None:
        """Copy standard input, in a thread, as not all files can be polled."""
        with contextlib.suppress(AgentError):  # it has exited or closed its input: unread input is not an error
            while data := _read_input():
                self._call("WriteStdin", (DATA, data))
            if not self._terminal:
                self._call("CloseStdin")

    def _copy(self, method: str, target: int) -> None:
        """Copy an output stream to its end, in a thread, as a slow reader must not block the other streams."""
        error: Exception | None = None
        try:
            while data := _field(self._call(method, (LENGTH, CHUNK)), RESPONSE_DATA, method):
                assert isinstance(data, bytes)
                write_all(target, data)
        except (AgentError, OSError) as problem:
            error = problem
        self._events.put(partial(self._output_ended, error))

    def _output_ended(self, error: Exception | None) -> None:
        if isinstance(error, OSError):
            with contextlib.suppress(AgentError):
                self._call("SignalProcess", (SIGNAL, signal.SIGPIPE))
            if not isinstance(error, BrokenPipeError):
                raise output_error(error) from error
            self._status, self._outputs = 128 + signal.SIGPIPE, 0
            return
        if error is not None and not (isinstance(error, AgentError) and error.reason == Reason.CONTAINER_NOT_FOUND):
            raise error
        self._outputs -= 1

    def _exited(self, frame: Frame | None) -> None:
        try:
            status = _field(received(frame), STATUS, "WaitProcess")
        except RpcError as error:
            raise agent_error(error) from error
        self._status = status_of(status if isinstance(status, int) else 0, self._stops)

    def _post(self, method: str, deliver: Callable[[Frame | None], None], *fields: tuple[int, int]) -> None:
        """Call a method without waiting for its response.  Raises AgentError."""
        assert self._client is not None
        try:
            self._client.post(AGENT, method, self._request(*fields), deliver)
        except RpcError as error:
            raise agent_error(error) from error

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
            self._post("SignalProcess", _ignore, (SIGNAL, number))

    def _resize(self) -> None:
        size = terminal_size(self._terminal)
        if size is not None:
            with contextlib.suppress(AgentError):
                self._post("TtyWinResize", _ignore, (ROWS, size[0]), (COLUMNS, size[1]))


def _ignore(_: object) -> None:
    """Ignore a response."""


def _read_input() -> bytes:
    try:
        return os.read(0, CHUNK)
    except OSError:
        return b""


def _field(response: bytes, number: int, method: str) -> int | bytes | None:
    """Return the field of a response.  Raises AgentError."""
    try:
        return wire.value_of(response, number)
    except wire.WireError:
        text = f"{method}: the answer is not a valid {method}Response"
        raise AgentError(StatusCode.INTERNAL, text) from None

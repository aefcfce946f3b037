"""Client errors: those that the caller can fix, and those from an agent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import IntEnum

from caisson.agent.rpc import wire
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc import frames
from caisson.agent.rpc.ttrpc.responses import ConnectionClosed, RpcError


class ClientError(Exception):
    """Report what went wrong in one line: object, problem, remedy."""


class UsageError(ClientError):
    """Report an invalid request."""


class ContainerUnavailable(ClientError):
    """Report a container whose state does not allow the operation: it has exited, is paused, or does not exist."""


class CopyError(ClientError):
    """Report a file that cannot be copied."""


class Reason(IntEnum):
    """The reason of an agent's error, for programs; numbers from caisson.proto."""

    UNSPECIFIED = 0
    CONTAINER_NOT_FOUND = 1
    PROCESS_NOT_FOUND = 2
    CONTAINER_STOPPED = 3
    CONTAINER_PAUSED = 4
    PROGRAM_NOT_FOUND = 5
    PROGRAM_NOT_EXECUTABLE = 6
    END_OF_OUTPUT = 7
    CONTAINER_RUNNING = 8
    OUTPUT_NOT_KEPT = 9


#: The name of caisson.ErrorDetails among the details of a status.
ERROR_DETAILS = f"{frames.TYPE_URL}caisson.ErrorDetails"

#: Maximum characters of an agent's text.
MAX_TEXT = 4096

#: A shell's exit statuses for a program that cannot be run.
EXIT_STATUS = {Reason.PROGRAM_NOT_FOUND: 127, Reason.PROGRAM_NOT_EXECUTABLE: 126}


class AgentError(Exception):
    """The agent returned an error.

    ``details`` is the text of its status, as the hosts of its API expect it; str() is the one for people, if the agent
    has sent one.
    """

    def __init__(self, code: StatusCode, details: str, reason: Reason = Reason.UNSPECIFIED, sentence: str = "") -> None:
        super().__init__(sentence or details or code.name)
        self.code = code
        self.details = details
        self.reason = reason


class AgentGone(AgentError):
    """The agent's socket no longer answers: the guest or its VM has exited."""

    def __init__(self, details: str) -> None:
        super().__init__(StatusCode.UNAVAILABLE, details)


class ProgramError(AgentError):
    """The program could not be run; exit_status is what a shell would report (127 not found, 126 not executable)."""

    def __init__(self, code: StatusCode, details: str, reason: Reason, sentence: str = "") -> None:
        super().__init__(code, details, reason, sentence)
        self.exit_status = EXIT_STATUS[reason]


def error_from_status(
    code: StatusCode, details: str, reason: Reason = Reason.UNSPECIFIED, sentence: str = ""
) -> AgentError:
    """Return the error for an agent's response."""
    kind = ProgramError if reason in EXIT_STATUS else AgentError
    return kind(code, details, reason, sentence)


def agent_error(error: RpcError) -> AgentError:
    """Return the error for a ttrpc call that failed.

    A status's details are for us, its text is for Kata's hosts.
    """
    if isinstance(error, ConnectionClosed):
        return connection_error(error.text)
    for type_url, value in error.details:
        if type_url == ERROR_DETAILS:
            try:
                fields = dict(wire.decode(value))
                number, text = fields.get(1, 0), fields.get(2, b"")
                reason = Reason(number if isinstance(number, int) else 0)
            except ValueError:  # malformed, or from a later agent
                continue
            sentence = text.decode(errors="replace")[:MAX_TEXT] if isinstance(text, bytes) else ""
            return error_from_status(error.code, error.text, reason, sentence)
    return error_from_status(error.code, error.text)


def connection_error(why: str) -> AgentGone:
    """Return the error for a connection that failed or was closed."""
    return AgentGone(f"agent: does not answer ({why}); `caisson list-vms` shows whether its VM is running")


@contextlib.contextmanager
def explain_container_errors(container_id: str) -> Iterator[None]:
    """Explain a container's problem and its remedy, in place of the agent's message.

    Raises ContainerUnavailable in that case.
    """
    try:
        yield
    except AgentError as error:
        text = _explanation(container_id, error)
        if not text:
            raise
        raise ContainerUnavailable(text) from error


def _explanation(name: str, error: AgentError) -> str:
    if error.reason is Reason.CONTAINER_NOT_FOUND:
        return f"container {name}: does not exist; list them: caisson ps --all"
    if error.reason is Reason.CONTAINER_STOPPED:
        again = f"start it again with: caisson start {name}"
        return f"container {name} has exited: its files are still available to cp; {again}"
    if error.reason is Reason.CONTAINER_PAUSED:
        return f"container {name}: is paused; resume it: caisson resume {name}"
    if error.reason is Reason.CONTAINER_RUNNING:
        return f"container {name}: has not exited; stop it first: caisson kill {name}"
    if error.reason is Reason.OUTPUT_NOT_KEPT:
        return f"container {name}: was not detached; output is only kept with: caisson run --detach"
    return ""

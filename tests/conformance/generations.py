"""List all differences between the generations of Kata's agent API in one table; otherwise their tests are the same."""

from __future__ import annotations

from dataclasses import dataclass

from caisson.agent.rpc.codes import StatusCode as Code

#: A status code and its text.
Answer = tuple[Code, str]


@dataclass(frozen=True)
class Generation:
    """The statuses and rules that hosts of a generation expect."""

    #: The package of its generated modules.
    name: str

    sandbox_not_running: Answer
    create_without_sandbox: Answer
    signal_without_sandbox: Answer
    container_not_found: Answer
    signal_unknown_container: Answer
    process_not_found: Answer
    signal_unknown_process: Answer
    container_exists: Answer
    start_running: Answer
    start_stopped: Answer
    exec_stopped: Answer
    no_terminal: Answer

    #: None if the end of output is an empty response.
    end_of_output: Answer | None

    #: None if a sandbox may be created again.
    sandbox_exists: Answer | None

    #: Methods that fail without a sandbox; the others fail because the container is unknown.
    gated: frozenset[str]

    #: Methods that only this generation has.
    only: frozenset[str]

    #: Whether an exec has its own capabilities, if it specifies any.
    exec_has_capabilities: bool

    #: Whether the agent keeps running after DestroySandbox.
    survives_destroy: bool


GATED = frozenset(
    {
        "CreateContainer", "StartContainer", "ExecProcess", "SignalProcess", "WaitProcess", "WriteStdin", "ReadStdout",
        "ReadStderr", "CloseStdin", "TtyWinResize",
    }
)  # fmt: skip

KATA1 = Generation(
    name="kata1",
    sandbox_not_running=(Code.FAILED_PRECONDITION, "Sandbox not started"),
    create_without_sandbox=(Code.FAILED_PRECONDITION, "Sandbox not started, impossible to run a new container"),
    signal_without_sandbox=(Code.FAILED_PRECONDITION, "Sandbox not started, impossible to signal the container"),
    container_not_found=(Code.NOT_FOUND, "Container no not found"),
    signal_unknown_container=(
        Code.FAILED_PRECONDITION,
        "Could not signal process no: rpc error: code = NotFound desc = Container no not found",
    ),
    process_not_found=(Code.NOT_FOUND, "Process no not found (container box)"),
    signal_unknown_process=(
        Code.NOT_FOUND,
        "Could not signal process: rpc error: code = NotFound desc = Process no not found (container box)",
    ),
    container_exists=(Code.ALREADY_EXISTS, "Container box already exists, impossible to create"),
    start_running=(Code.FAILED_PRECONDITION, "Container box status running, should be created"),
    start_stopped=(Code.FAILED_PRECONDITION, "Container dead status stopped, should be created"),
    exec_stopped=(Code.FAILED_PRECONDITION, "Cannot exec in stopped container dead"),
    no_terminal=(Code.FAILED_PRECONDITION, "Terminal is not set, impossible to resize it"),
    end_of_output=(Code.UNKNOWN, "EOF"),
    sandbox_exists=(Code.ALREADY_EXISTS, "Sandbox already started, impossible to start again"),
    gated=GATED,
    only=frozenset({"ListProcesses", "StartTracing", "StopTracing"}),
    exec_has_capabilities=False,
    survives_destroy=True,
)

UNKNOWN_CONTAINER = (Code.INVALID_ARGUMENT, "invalid container id")
UNKNOWN_PROCESS = (Code.NOT_FOUND, "process no: not found in container box")

KATA3 = Generation(
    name="kata3",
    sandbox_not_running=UNKNOWN_CONTAINER,
    create_without_sandbox=(Code.FAILED_PRECONDITION, "the sandbox is not running; create it first"),
    signal_without_sandbox=UNKNOWN_CONTAINER,
    container_not_found=UNKNOWN_CONTAINER,
    signal_unknown_container=UNKNOWN_CONTAINER,
    process_not_found=UNKNOWN_PROCESS,
    signal_unknown_process=UNKNOWN_PROCESS,
    container_exists=(
        Code.ALREADY_EXISTS,
        "container box: already exists; remove it first, or choose another id",
    ),
    start_running=(Code.FAILED_PRECONDITION, "container box: cannot be started: it is running"),
    start_stopped=(Code.FAILED_PRECONDITION, "container dead: cannot be started: it is stopped"),
    exec_stopped=(Code.FAILED_PRECONDITION, "container dead: cannot run another process: it is stopped"),
    no_terminal=(Code.UNAVAILABLE, "no tty"),
    end_of_output=None,
    sandbox_exists=None,
    gated=frozenset({"CreateContainer"}),
    only=frozenset(),
    exec_has_capabilities=True,
    survives_destroy=False,
)

"""Find the running VM for a command, and explain its exit.  Imports little: most of these commands are one call."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from caisson.agent.client.errors import AgentGone, ClientError
from caisson.image.vm.errors import VMEnded, VMError
from caisson.image.vm.running import RunningVM, get_vm

#: Seconds for the agent of a running VM to answer, and between checks that the VM is still running.
AGENT_TIMEOUT = 60.0
CHECK_INTERVAL = 3.0

#: Seconds for a VM to exit after its agent is gone.
EXIT_TIMEOUT = 2.0


@contextlib.contextmanager
def running_vm(name: str, *, answering: bool = True) -> Iterator[RunningVM]:
    """Find the running VM of this name, whose agent answers; if it exits within the block, report that.

    Unless ``answering``, only the agent of a VM that is still starting is waited for.  Raises VMError.
    """
    with explain_exit(get_vm(name)) as vm:
        if answering or vm.info.get("state") != "running":
            await_agent(vm)
        yield vm


def await_agent(vm: RunningVM) -> None:
    """Wait until the agent of a running VM answers.  Raises VMError."""
    from caisson.agent.client.readiness import is_serving  # late: exec asks the agent for nothing else

    deadline = time.monotonic() + AGENT_TIMEOUT
    while not is_serving(vm.agent_socket, timeout=CHECK_INTERVAL):
        if (reason := vm.exit_reason(timeout=0)) is not None:
            raise VMEnded(vm.name, reason)
        if time.monotonic() > deadline:
            raise VMError(f"VM {vm.name!r}: its agent does not answer; see {vm.directory / 'console.log'}")


@contextlib.contextmanager
def explain_exit(vm: RunningVM) -> Iterator[RunningVM]:
    """If the VM has exited, raise VMEnded with its reason, in place of a connection or file error."""
    try:
        yield vm
    except VMEnded:
        raise
    except (AgentGone, VMError, ClientError, FileNotFoundError, ConnectionRefusedError) as error:
        lost = isinstance(error, AgentGone)
        reason = vm.exit_reason(timeout=EXIT_TIMEOUT if lost else 0)
        if reason is None:
            raise
        raise VMEnded(vm.name, reason) from error

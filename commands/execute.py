"""Run a program in a container: the most frequent command, so it imports only what it needs.

A running VM is found by its directory alone; the code to boot one is imported only if none is running.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from caisson.agent.base.lazyimport import load_deferred
from caisson.agent.base.record import Record
from caisson.agent.client.caller import DEFAULT, user_document
from caisson.agent.client.errors import AgentGone, UsageError
from caisson.agent.client.execute import execute
from caisson.commands.streams import reporter
from caisson.image.vm.directory import find_running

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from caisson.agent.client.guest import Machine


class RunningMachine(Record):
    """The part of a running VM that the client needs."""

    directory: Path
    agent_socket: Path


def exec_(
    *, words: list[str], name: str, container: str | None, guest: bool, tty: bool, interactive: bool, env: list[str],
    user: str, workdir: str, network: str, verbose: bool,
) -> int:  # fmt: skip
    """Run a program in a container, or in the guest itself; returns its exit status."""
    check_terminal(tty)
    if guest and container:
        raise UsageError("--guest: is outside all containers; leave --container out")
    who = user_document(user)
    if guest:
        load_deferred()
        from caisson.commands.machines import find_or_boot_vm
        from caisson.commands.program import execute_in_guest

        with find_or_boot_vm(name, reporter(verbose), network=network) as vm:
            return execute_in_guest(vm, words, env=env, cwd=workdir, user=who, terminal=tty)
    with _machine(name, network, verbose) as machine:
        return execute(machine, container or DEFAULT, words, env=env, cwd=workdir, user=who, terminal=tty)


@contextlib.contextmanager
def _machine(name: str, network: str, verbose: bool) -> Iterator[Machine]:
    """Yield the running VM of this name, or otherwise the one from `find_or_boot_vm`.  Raises VMError, UsageError."""
    found = None if network else find_running(name or "default")
    if found is None:
        load_deferred()
        from caisson.commands.machines import find_or_boot_vm

        with find_or_boot_vm(name, reporter(verbose), answering=False, network=network) as vm:
            yield vm
        return
    directory, _ = found
    try:
        yield RunningMachine(directory.path, directory.agent_socket)
    except AgentGone:
        load_deferred()
        from caisson.commands.machines import explain_exit
        from caisson.image.vm import VM

        with explain_exit(VM(*found)):
            raise


def check_terminal(wanted: bool) -> None:
    """Reject --tty if standard input is not a terminal: input would never end.  Raises UsageError."""
    if wanted and not sys.stdin.isatty():
        raise UsageError("--tty: standard input is not a terminal; leave --tty out")

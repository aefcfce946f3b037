"""Run programs in containers, and copy files: the most frequent commands, so they import only what they need.

A running VM is found by its directory alone; the code to boot one is imported only if none is running.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from caisson.agent.base.lazyimport import load_deferred
from caisson.agent.base.record import Record
from caisson.agent.client.caller import DEFAULT, user_document
from caisson.agent.client.errors import AgentGone, ClientError, UsageError, explain_container_errors
from caisson.agent.client.execute import execute
from caisson.commands.streams import info, reporter
from caisson.image.vm.directory import find_running

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from caisson.agent.client.guest import Machine
    from caisson.image.vm.directory import VMDirectory

#: An interactive shell: bash if available.
SHELL = ["sh", "-c", "command -v bash >/dev/null && exec bash; exec sh"]


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


def shell(*, container: str, guest: bool, name: str) -> int:
    """Open an interactive shell; returns its exit status."""
    terminal = sys.stdin.isatty()
    if not guest:
        with running_machine(name) as machine:
            return execute(machine, container, SHELL, terminal=terminal)
    load_deferred()
    from caisson.commands.machines import running_vm
    from caisson.commands.program import execute_in_guest

    with running_vm(name) as vm:
        return execute_in_guest(vm, SHELL, terminal=terminal)


def cp(*, source: str, target: str, name: str) -> int:
    """Copy a file or a directory into or out of a container; returns 1 if something cannot be copied."""
    from caisson.agent.client.copy import copy, parse_locations  # late: exec needs none of it

    from_, to = parse_locations(source, target)
    with running_machine(name) as machine, explain_container_errors(from_.container or to.container):
        left_out = copy(machine, source, target, info)
    for one in left_out:
        info(f"not copied: {one}")
    return int(bool(left_out))


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
    with _explain_exit(*found) as machine:
        yield machine


@contextlib.contextmanager
def running_machine(name: str) -> Iterator[Machine]:
    """Yield the running VM of this name, waiting for the agent of one that starts.  Raises VMError."""
    found = find_running(name)
    if found is not None and found[1].get("state") == "running":
        with _explain_exit(*found) as machine:
            yield machine
        return
    load_deferred()
    from caisson.commands.machines import running_vm

    with running_vm(name) as vm:
        yield vm


@contextlib.contextmanager
def _explain_exit(directory: VMDirectory, info: dict[str, Any]) -> Iterator[RunningMachine]:
    """Yield a running VM; if it exits within the block, raise VMEnded with its reason."""
    try:
        yield RunningMachine(directory.path, directory.agent_socket)
    except (AgentGone, ClientError, FileNotFoundError) as error:
        if not isinstance(error, AgentGone) and directory.is_running():
            raise
        load_deferred()
        from caisson.commands.machines import explain_exit
        from caisson.image.vm import VM

        with explain_exit(VM(directory, info)):
            raise


def check_terminal(wanted: bool) -> None:
    """Reject --tty if standard input is not a terminal: input would never end.  Raises UsageError."""
    if wanted and not sys.stdin.isatty():
        raise UsageError("--tty: standard input is not a terminal; leave --tty out")

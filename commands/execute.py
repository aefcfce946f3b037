"""Run programs in containers, and copy files: the most frequent commands, so they import only what they need.

A running VM is found by its directory alone; the code to boot one is imported only if none is running.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

from caisson.agent.base.lazyimport import load_deferred
from caisson.agent.client.caller import DEFAULT, user_document
from caisson.agent.client.errors import UsageError, explain_container_errors
from caisson.agent.client.execute import execute
from caisson.commands.running import explain_exit, running_vm
from caisson.commands.streams import info, reporter
from caisson.image.vm.running import find_vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.client.guest import Machine

#: An interactive shell: bash if available.
SHELL = ["sh", "-c", "command -v bash >/dev/null && exec bash; exec sh"]


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
        with running_vm(name, answering=False) as vm:
            return execute(vm, container, SHELL, terminal=terminal)
    load_deferred()
    from caisson.commands.program import execute_in_guest

    with running_vm(name) as vm:
        return execute_in_guest(vm, SHELL, terminal=terminal)


def cp(*, source: str, target: str, name: str) -> int:
    """Copy a file or a directory into or out of a container; returns 1 if something cannot be copied."""
    from caisson.agent.client.copy import copy, parse_locations  # late: exec needs none of it

    from_, to = parse_locations(source, target)
    with (
        running_vm(name, answering=False) as vm,
        explain_container_errors(from_.container or to.container),
        _exiting_at_signals(),
    ):
        left_out = copy(vm, source, target, info)
    for one in left_out:
        info(f"not copied: {one}")
    return int(bool(left_out))


@contextlib.contextmanager
def _exiting_at_signals() -> Iterator[None]:
    """Raise SystemExit when the command is to end, unless that is ignored: what it has begun is undone then."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    handled = [number for number, handler in before.items() if handler is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _machine(name: str, network: str, verbose: bool) -> Iterator[Machine]:
    """Yield the running VM of this name, or otherwise the one from `find_or_boot_vm`.  Raises VMError, UsageError."""
    found = None if network else find_vm(name or "default")
    if found is None:
        load_deferred()
        from caisson.commands.machines import find_or_boot_vm

        with find_or_boot_vm(name, reporter(verbose), answering=False, network=network) as vm:
            yield vm
        return
    with explain_exit(found):
        yield found


def check_terminal(wanted: bool) -> None:
    """Reject --tty if standard input is not a terminal: input would never end.  Raises UsageError."""
    if wanted and not sys.stdin.isatty():
        raise UsageError("--tty: standard input is not a terminal; leave --tty out")

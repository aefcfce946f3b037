"""From argv to an exit status: find the command, parse its arguments, run it, and report errors in one line."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from caisson.agent.base.lazyimport import load_deferred
from caisson.commands import streams
from caisson.commands.catalogue import GROUPS
from caisson.commands.declare import NOT_EXECUTED_STATUS, Command, Group
from caisson.commands.parse import CommandLineError, HelpWanted, find_command, parse
from caisson.commands.renamed import OLD_COMMANDS
from caisson.commands.usage import help_of, overview
from caisson.proto.contract import VERSION

#: Errors reported as one line, without a traceback: by name, since most commands need only some of their modules.
EXPECTED_ERRORS = (
    "caisson.agent.client.caller:OutputError",
    "caisson.agent.client.errors:AgentError",
    "caisson.agent.client.errors:ClientError",
    "caisson.image.errors:ImageError",
    "caisson.image.vm.errors:VMError",
)

#: Those of them that are usage errors.
USAGE_ERRORS = ("caisson.agent.client.errors:UsageError", "caisson.image.vm.errors:InvalidOption")

#: That of a container that has exited, or does not exist.
NO_CONTAINER = "caisson.agent.client.errors:ContainerUnavailable"

#: Errors of writing, which have no file name: to a full disk, beyond a quota, beyond `ulimit -f`.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: First words that request the overview; the last two are Invoke's.
OVERVIEW_WORDS = ("--help", "-h", "--list", "-l")

#: Exit statuses of a command killed by a signal: 128 plus its number.
INTERRUPTED, PIPE_CLOSED = 130, 141


def main(words: Sequence[str] | None = None, *more: Group) -> int:
    """Run a command line (sys.argv's, if none is given) and return its exit status; ``more`` are a checkout's own."""
    streams.occupy_standard_descriptors()
    streams.write_any_text()
    streams.filter_terminals()
    try:
        status = CommandLine((*GROUPS, *more)).run(sys.argv[1:] if words is None else words)
        error = streams.flush()
        if error and status == 0:
            streams.info(one_line(error) or f"stdout: {error.strerror}")
        return status or int(error is not None)
    except BrokenPipeError:  # the reader is gone, as with `| head`
        streams.give_up_stdout()
        return PIPE_CLOSED
    except OSError as error:  # of help, or of the version: a command's own are reported by it
        if not (text := one_line(error)):
            raise
        streams.give_up_stdout()
        streams.info(text)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


class CommandLine:
    """The commands of these groups, found by name and run."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups
        self.commands = {command.name: command for group in groups for command in group.commands}
        self._own: dict[str, Callable[..., int | None]] = {
            "help": self._help,
            "complete": self._complete,
        }  # these are about other commands

    def run(self, words: Sequence[str]) -> int:
        """Run the command named by the first word; returns its exit status."""
        try:
            if not words or words[0] in OVERVIEW_WORDS:
                words = ["help", *(word for word in words[1:] if not word.startswith("-"))]
            if words[0] in ("--version", "-V"):
                print(f"caisson {VERSION}")
                return 0
            name = words[0]
            if name in OLD_COMMANDS:
                streams.info(f"{name}: the command is {OLD_COMMANDS[name]} now; the old name still works")
                name = OLD_COMMANDS[name]
            return self._run_command(find_command(name, self.commands), words[1:])
        except CommandLineError as error:
            streams.info(str(error))
            return error.status

    def _run_command(self, command: Command, words: Sequence[str]) -> int:
        try:
            values, old = parse(command, words)
        except HelpWanted:
            sys.stdout.write(help_of(command))
            return 0
        for line in old:
            streams.info(line)
        try:
            if not command.is_short:
                load_deferred()
            function = self._own[command.name] if command.name in self._own else load(command.run)
            return int(function(**values) or 0)
        except (BrokenPipeError, CommandLineError):
            raise
        except Exception as error:
            return _report(error, command)

    def _help(self, *, command: str, man: bool) -> None:
        if man:
            from caisson.commands.manpage import manual

            sys.stdout.write(manual(self.groups, VERSION))
        elif command:
            name = OLD_COMMANDS.get(command, command)
            sys.stdout.write(help_of(find_command(name, self.commands)))
        else:
            sys.stdout.write(overview(self.groups))

    def _complete(self, *, words: list[str]) -> None:
        from caisson.commands.completion import complete
        from caisson.commands.names import lookup

        for line in complete(self.commands, words, lookup):
            print(line)


def load(run: str) -> Callable[..., int | None]:
    """Import the function named by a declaration's ``run``."""
    module, _, function = run.partition(":")
    found: Callable[..., int | None] = getattr(importlib.import_module(module), function)
    return found


def _report(error: Exception, command: Command) -> int:
    """Report an error: in one line if the user can act on it; a bug keeps its traceback."""
    text = one_line(error)
    if not text or os.environ.get("CAISSON_DEBUG"):
        traceback.print_exc()
    if text:
        streams.info(text)
    status = getattr(error, "exit_status", None)  # a program that could not be run: 126 or 127
    if isinstance(status, int):
        return status
    names = _names(error)
    if command.enters_container and NO_CONTAINER in names:
        return NOT_EXECUTED_STATUS
    return command.usage_status if names & set(USAGE_ERRORS) else command.error_status


def one_line(error: Exception) -> str:
    """Return the line for the user; empty if this is a bug."""
    if _names(error) & set(EXPECTED_ERRORS):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
        return f"output: {error.strerror}; make room for it, or write it elsewhere"
    return ""


def _names(error: Exception) -> set[str]:
    return set(f"{one.__module__}:{one.__qualname__}" for one in type(error).__mro__)


if __name__ == "__main__":
    sys.exit(main())

"""Parse a command line according to the declarations.

Why not argparse: a program's arguments must be passed on untouched (its REMAINDER drops or keeps `--`, depending on the
version), errors must be one line with a remedy, and exec has its own exit status.
"""

from __future__ import annotations

import difflib
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from caisson.commands.declare import HELP, WRONG_USAGE, BadValue, Command, Kind, Option, Positional
from caisson.commands.renamed import OLD_OPTIONS
from caisson.commands.usage import usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

#: A word that begins with "-" but is a value.
NEGATIVE = re.compile(r"-\.?\d[\d.]*[A-Za-z]{0,3}")


class CommandLineError(Exception):
    """An invalid command line; the text is `object: problem; remedy`."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class HelpWanted(Exception):
    """--help was given anywhere on the command line."""


def show(word: str) -> str:
    """Format a user's word on one line."""
    return word if word.isprintable() and word and " " not in word else repr(word)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word that was probably meant; empty if there is none."""
    lowered = {one.lower(): one for one in known}
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return lowered[close[0]] if close else ""


def find_command(word: str, commands: Mapping[str, Command]) -> Command:
    """Look up a command.  Raises CommandLineError suggesting the one that was probably meant."""
    if word in commands:
        return commands[word]
    known = [name for name, command in commands.items() if not command.hidden]
    meant = nearest(word, known)
    remedy = f"did you mean {meant}?" if meant else "`caisson help` lists the commands"
    what = "unknown option" if word.startswith("-") else "unknown command"
    raise CommandLineError(f"{show(word)}: {what}; {remedy}", WRONG_USAGE)


def parse(command: Command, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Parse the words after a command's name: returns values by parameter, and the old names that were used.

    Raises CommandLineError, and HelpWanted for --help before the program's first word.
    """
    return _Parser(command).read(words)


class _Parser:
    def __init__(self, command: Command) -> None:
        self.command = command
        self.values: dict[str, Any] = {one.parameter: one.start for one in command.parameters()}
        self.given: set[str] = set()
        self.places: list[str] = []
        self.old: list[str] = []
        own = {f"--{option.name}": option for option in (*command.options, HELP)}
        named = {f"--{place.name}": place for place in command.positionals}
        self.known: dict[str, Option | Positional] = {**named, **own}
        self.short = {f"-{option.short}": option for option in (*command.options, HELP) if option.short}

    def read(self, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        queue = deque(words)
        program: list[str] = []
        while queue:
            word = queue.popleft()
            if word == "--":
                program = self._after_dashes(queue)
                break
            if word.startswith("-") and word != "-" and not self._is_number(word):
                self._option(word, queue)
            elif self.command.program and self._free_place() is None:
                program = [word, *queue]  # its first word: the rest belongs to it
                break
            else:
                self._place(word)
        self._finish(program)
        return self.values, self.old

    def _after_dashes(self, queue: deque[str]) -> list[str]:
        """Parse what follows `--`, which has no options: required positionals, then the program."""
        while queue and (not self.command.program or self._free_place(required=True) is not None):
            self._place(queue.popleft())
        return list(queue)

    def _is_number(self, word: str) -> bool:
        return bool(NEGATIVE.fullmatch(word)) and word[:2] not in self.short and bool(self.command.positionals)

    def _free_place(self, required: bool = False) -> Positional | None:
        """Find the positional for the next word."""
        free = [place for place in self.command.positionals if place.repeat or place.parameter not in self.given]
        return next((place for place in free if place.required or not required), None)

    def _place(self, word: str) -> None:
        place = self._free_place()
        if place is None:
            self._refuse(f"{show(word)}: unexpected argument; usage: {usage(self.command)}")
        else:
            self._set(place, place.metavar, word)

    def _option(self, word: str, queue: deque[str]) -> None:
        if not word.startswith("--"):
            self._short_options(word, queue)
            return
        name, equals, value = word.partition("=")
        option = self._find(name)
        if isinstance(option, Option) and option.kind is None:
            if equals:
                self._refuse(f"{name}: takes no value; write {name} alone")
            self._flag(option)
        else:
            self._set(option, name, value if equals else self._value(name, option, queue))

    def _short_options(self, word: str, queue: deque[str]) -> None:
        """Parse `-it` as `-i -t`, and `-ualice` as `-u alice`."""
        for place, letter in enumerate(word[1:], 1):
            option = self.short.get(f"-{letter}")
            if option is None:
                self._unknown(f"-{letter}" if len(word) == 2 else word)
            elif option.kind is None:
                self._flag(option)
            else:
                rest = word[place + 1 :].removeprefix("=")
                self._set(option, f"-{letter}", rest or self._value(f"-{letter}", option, queue))
                return

    def _find(self, name: str) -> Option | Positional:
        renamed = OLD_OPTIONS.get((self.command.name, name.removeprefix("--")))
        if renamed:
            self.old.append(f"{name}: the option is --{renamed} now; the old one still works")
            name = f"--{renamed}"
        if name not in self.known:
            self._unknown(name)
        return self.known[name]

    def _unknown(self, name: str) -> NoReturn:
        shown = [f"--{option.name}" for option in (*self.command.options, HELP)]
        meant = nearest(name, shown) if name.startswith("--") else ""
        if meant:
            remedy = f"did you mean {meant}?"
        elif self.command.program:
            remedy = f"a program's own options go after --: {usage(self.command)}"
        else:
            remedy = f"see caisson {self.command.name} --help"
        self._refuse(f"{show(name)}: unknown option; {remedy}")

    def _value(self, name: str, option: Option | Positional, queue: deque[str]) -> str:
        example = _kind(option).example
        if not queue:
            self._refuse(f"{name}: a value is missing; for example {name} {example}")
        if queue[0].startswith("-") and queue[0] != "-" and not NEGATIVE.fullmatch(queue[0]):
            self._refuse(f"{name}: a value is missing before {show(queue[0])}; one that begins with - is {name}=VALUE")
        return queue.popleft()

    def _flag(self, option: Option) -> None:
        if option is HELP:
            raise HelpWanted
        self.values[option.parameter] = True

    def _set(self, option: Option | Positional, name: str, word: str) -> None:
        try:
            value = _kind(option).read(word)
        except BadValue as error:
            remedy = "" if ";" in str(error) else f"; for example {name} {_kind(option).example}"
            self._refuse(f"{name} {show(word)}: {error}{remedy}")
        self.given.add(option.parameter)
        if option.repeat:
            self.values[option.parameter].append(value)
        else:
            self.values[option.parameter] = value

    def _finish(self, program: list[str]) -> None:
        missing = next(
            (one for one in self.command.positionals if one.required and one.parameter not in self.given), None
        )
        if missing:
            self._refuse(f"{missing.metavar} is missing; usage: {usage(self.command)}")
        if self.command.program:
            if self.command.program.required and not program:
                self._refuse(f"{self.command.program.metavar} is missing; usage: {usage(self.command)}")
            self.values[self.command.program.dest] = program

    def _refuse(self, text: str) -> NoReturn:
        raise CommandLineError(f"{self.command.name}: {text}", self.command.usage_status)


def _kind(option: Option | Positional) -> Kind:
    assert option.kind is not None
    return option.kind

"""Declare a command once: parser, help, manual page, completion and tests derive from it.

Imports almost nothing, like everything needed for `caisson --version` and for usage errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Exit status of a usage error, as in other commands.
WRONG_USAGE = 2

#: Exit status of exec, run and shell when the program could not be run at all, and of cp and share when there is no
#: such container to enter; 126, 127 and 128+n are those of a shell.
NOT_EXECUTED_STATUS = 125

MEMORY_UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}
TIME_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class BadValue(ValueError):
    """An invalid value; the text completes the sentence "--option 'word': …"."""


class Kind(Record):
    """Describe a kind of values.

    ``read`` parses a word and raises BadValue; ``metavar`` stands for it in help; ``complete`` says how a shell
    completes it: "file", "directory", "vm", "container", "snapshot", "template" or nothing.
    """

    metavar: str
    read: Callable[[str], Any]
    example: str
    range: str = ""
    choices: tuple[str, ...] = ()
    complete: str = ""


def _text(word: str) -> str:
    return word


def _present(word: str) -> str:
    if not word:
        raise BadValue("is empty")
    return word


def _printable(word: str) -> str:
    if not word.isprintable():  # a byte that is not UTF-8 is a surrogate here, which no message to a guest can hold
        raise BadValue("is not a name; give letters, digits, . _ and -")
    return _present(word)


TEXT = Kind("TEXT", _text, "text")
FILE = Kind("FILE", _present, "./file", complete="file")
DIRECTORY = Kind("DIR", _present, "./directory", complete="directory")
VM_NAME = Kind("NAME", _present, "web", complete="vm")
CONTAINER = Kind("CONTAINER", _printable, "web", complete="container")
SHARE_TAG = Kind("TAG", _printable, "src")
SNAPSHOT = Kind("SNAPSHOT", _present, "small", complete="snapshot")
TEMPLATE = Kind("TEMPLATE", _present, "lean", complete="template")


def name(metavar: str, example: str, complete: str = "") -> Kind:
    """Accept any non-empty word."""
    return Kind(metavar, _present, example, complete=complete)


def choice(*words: str) -> Kind:
    """Accept one of these words."""

    def read(word: str) -> str:
        if word not in words:
            raise BadValue(f"is unknown; give {', '.join(words[:-1])} or {words[-1]}")
        return word

    return Kind("|".join(words), read, words[0], choices=words)


def integer(low: int, high: int) -> Kind:
    """Accept a whole number in this range."""

    def read(word: str) -> int:
        if not word.removeprefix("-").isascii() or not word.removeprefix("-").isdecimal():
            raise BadValue(f"is not a whole number; give {low} to {high}")
        if len(word) > 20 or not low <= int(word) <= high:
            raise BadValue(f"is out of range; give {low} to {high}")
        return int(word)

    return Kind("N", read, str(low), f"{low} to {high}")


def decimal(low: float, high: float) -> Kind:
    """Accept a decimal number in this range."""

    def read(word: str) -> float:
        try:
            value = _number(word)
        except BadValue:
            raise BadValue(f"is not a number; give {low:g} to {high:g}") from None
        if not low <= value <= high:
            raise BadValue(f"is out of range; give {low:g} to {high:g}")
        return value

    return Kind("N", read, "1.5", f"{low:g} to {high:g}")


def memory(low: int, high: int) -> Kind:
    """Accept a size in MiB, or with a unit (powers of 1024): 512, 512M, 2G, 1.5GiB; the value is in MiB."""
    range = f"{show_memory(low)} to {show_memory(high)}"

    def read(word: str) -> int:
        number = word.upper().removesuffix("B").removesuffix("I")
        unit = MEMORY_UNITS.get(number[-1:], 0)
        try:
            size = _number(number[:-1]) * unit if unit else _number(word)
        except BadValue:
            raise BadValue("is not a size; for example 512M or 2G (without a unit: MiB)") from None
        if not low <= size <= high:
            raise BadValue(f"is out of range; give {range}")
        return int(size)

    return Kind("SIZE", read, "512M", range)


def show_memory(size: int) -> str:
    """Format a number of MiB with the largest unit that keeps it whole."""
    for unit in "TG":
        if size and size % MEMORY_UNITS[unit] == 0:
            return f"{size // int(MEMORY_UNITS[unit])}{unit}"
    return f"{size}M"


def seconds(low: float = 0, high: float = 86400 * 365) -> Kind:
    """Accept a time in seconds, or with a unit: 30, 0.5, 30s, 5m, 1h."""

    def read(word: str) -> float:
        unit = TIME_UNITS.get(word[-1:], 0.0)
        try:
            time = _number(word[:-1]) * unit if unit else _number(word)
        except BadValue:
            raise BadValue("is not a time; for example 30, 0.5 or 5m (without a unit: seconds)") from None
        if not low <= time <= high:
            raise BadValue(f"is out of range; give {low:g} to {high:.0f} seconds")
        return time

    return Kind("SECONDS", read, "30")


def _number(word: str) -> float:
    """Parse digits with at most one point: no sign but "-", no exponent, no "nan"."""
    digits = word.removeprefix("-").replace(".", "", 1)
    if not digits.isascii() or not digits.isdecimal() or len(digits) > 20:
        raise BadValue("is not a number")
    return float(word)


def setting(metavar: str, example: str) -> Kind:
    """Accept NAME=value; the name is not empty."""

    def read(word: str) -> str:
        if word.find("=") < 1:
            raise BadValue(f"is not {metavar}; for example {example}")
        return word

    return Kind(metavar, read, example)


class Option(Record):
    """Declare an option; one without a kind is a flag.

    If only the command knows the default, it is None, and ``shown`` describes it.  A repeatable option's value is a
    list.
    """

    name: str
    help: str
    kind: Kind | None = None
    default: Any = None
    short: str = ""
    repeat: bool = False
    shown: str = ""
    dest: str = ""

    @property
    def parameter(self) -> str:
        """The parameter of the command's function."""
        return self.dest or self.name.replace("-", "_")

    @property
    def start(self) -> Any:
        """The value if it is not given."""
        if self.repeat:
            return []
        return False if self.kind is None else self.default


class Positional(Record):
    """Declare a positional; it can also be given as an option of its name.

    One with a default or ``optional`` may be omitted; ``repeat`` takes all remaining words.
    """

    name: str
    help: str
    kind: Kind = TEXT
    default: Any = None
    optional: bool = False
    repeat: bool = False
    shown: str = ""
    dest: str = ""

    @property
    def parameter(self) -> str:
        return self.dest or self.name.replace("-", "_")

    @property
    def required(self) -> bool:
        return self.default is None and not self.optional

    @property
    def start(self) -> Any:
        return [] if self.repeat else self.default

    @property
    def metavar(self) -> str:
        return self.name.upper()


class Program(Record):
    """Declare that the command runs a program: everything from its first word on belongs to the program."""

    help: str
    metavar: str = "COMMAND"
    required: bool = True
    dest: str = "words"


class Command(Record):
    """Declare a command; ``run`` is "module:function", imported on use ("": built into the command line).

    The function takes the values of all options, positionals and the program's words as keywords.  With
    ``runs_program``, the exit status is the program's, so earlier failures have a status that no shell gives to a
    program.  With ``enters_container``, a container that has exited or does not exist gets the same status.

    With ``is_short``, modules that entry.py defers stay so: it ends before it needs them, or loads them itself.
    """

    name: str
    summary: str
    run: str
    details: str = ""
    positionals: tuple[Positional, ...] = ()
    options: tuple[Option, ...] = ()
    program: Program | None = None
    examples: tuple[str, ...] = ()
    hidden: bool = False
    runs_program: bool = False
    enters_container: bool = False
    is_short: bool = False

    @property
    def usage_status(self) -> int:
        """The exit status of a usage error."""
        return NOT_EXECUTED_STATUS if self.runs_program else WRONG_USAGE

    @property
    def error_status(self) -> int:
        """The exit status of a later error."""
        return NOT_EXECUTED_STATUS if self.runs_program else 1

    def parameters(self) -> Iterator[Option | Positional]:
        yield from self.positionals
        yield from self.options


class Group(Record):
    """Commands under a heading of the overview."""

    title: str
    commands: tuple[Command, ...]


HELP = Option("help", "show this help", short="h")

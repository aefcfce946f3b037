"""Options of the command line as runc (Go's flag package, urfave/cli) reads them.

`-name` and `--name` are the same, a value follows as `=value` or as the next argument, a repeatable option can be given
again.  argparse is not used: importing it takes as long as all of `state` should.
"""

from __future__ import annotations

from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Value = str | int | bool | list[str] | list[int]

FLAG, TEXT, NUMBER, LIST, NUMBERS = "flag", "text", "number", "list", "numbers"
TRUE = ("1", "t", "T", "true", "TRUE", "True")
FALSE = ("0", "f", "F", "false", "FALSE", "False")
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


class OptionError(Exception):
    """An invalid command line; str() follows "Incorrect Usage: "."""


class RuntimeOption(Record):
    """One option.  `default` is its value if not given; None shows no default."""

    name: str
    kind: str
    help: str
    short: str = ""
    default: str | int | bool | None = None

    @property
    def initial(self) -> Value | None:
        """The initial value of the option."""
        if self.default is not None:
            return self.default
        empty: dict[str, Value] = {FLAG: False, TEXT: "", NUMBER: 0, LIST: [], NUMBERS: []}
        return empty[self.kind]


class Values:
    """The options of one command: values by name, and which ones were given."""

    def __init__(self, options: Iterable[RuntimeOption]) -> None:
        self._values: dict[str, Value | None] = {option.name: option.initial for option in options}
        self.given: set[str] = set()

    def set(self, option: RuntimeOption, word: str, text: str) -> None:
        """Set a value as written, for the option named by `word`.  Raises OptionError."""
        self.given.add(option.name)
        try:
            if option.kind == LIST:
                self._values[option.name] = [*self.texts(option.name), text]
            elif option.kind == NUMBERS:
                self._values[option.name] = [*self.numbers(option.name), decimal(text)]
            elif option.kind == NUMBER:
                self._values[option.name] = number(text)
            elif option.kind == FLAG:
                if text not in TRUE and text not in FALSE:
                    raise OptionError(f'invalid boolean value "{text}" for -{word}: parse error')
                self._values[option.name] = text in TRUE
            else:
                self._values[option.name] = text
        except ValueError as error:
            raise OptionError(f'invalid value "{text}" for flag -{word}: {error}') from None

    def replace(self, name: str, value: Value) -> None:
        """Replace the given value."""
        self._values[name] = value

    def flag(self, name: str) -> bool:
        """Return whether a flag is set."""
        return bool(self._values[name])

    def text(self, name: str) -> str:
        """Return the value of a text option."""
        return str(self._values[name])

    def number(self, name: str) -> int:
        """Return the value of a numeric option."""
        value = self._values[name]
        assert isinstance(value, int)
        return value

    def texts(self, name: str) -> list[str]:
        """Return all values of a repeatable option."""
        return [str(one) for one in self._list(name)]

    def numbers(self, name: str) -> list[int]:
        """Return all values of a repeatable numeric option."""
        return [int(one) for one in self._list(name)]

    def _list(self, name: str) -> list[str] | list[int]:
        value = self._values[name]
        assert isinstance(value, list)
        return value


def number(text: str) -> int:
    """Parse a number as Go's flags do: 0x10 is 16, and 010 is 8.  Raises ValueError with Go's reason."""
    digits = text.lstrip("+-")
    try:
        if not text.isascii() or text != text.strip():
            raise ValueError
        value = int(text, 8 if digits.isdecimal() and digits.startswith("0") else 0)
    except ValueError:
        raise ValueError("parse error") from None
    if not INT64_MIN <= value <= INT64_MAX:
        raise ValueError("value out of range")
    return value


def decimal(text: str) -> int:
    """Parse a decimal number as Go's strconv does.  Raises ValueError with Go's reason."""
    digits = text[1:] if text[:1] in ("+", "-") else text
    if not (digits.isascii() and digits.isdecimal()):
        raise ValueError(f'strconv.ParseInt: parsing "{text}": invalid syntax')
    if not INT64_MIN <= int(text) <= INT64_MAX:
        raise ValueError(f'strconv.ParseInt: parsing "{text}": value out of range')
    return int(text)


def parse(options: Sequence[RuntimeOption], argv: Sequence[str], *, stop_at_operand: bool) -> tuple[Values, list[str]]:
    """Parse options and operands; with `stop_at_operand`, everything after the first operand is operands.

    Without it, known options may follow operands, and unknown ones there are operands.  `--` ends the
    options.  Raises OptionError.
    """
    known = {name: option for option in options for name in (option.name, option.short) if name}
    values, operands = Values(options), []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            operands += rest
            break
        if not word.startswith("-") or word == "-":
            operands.append(word)
            if stop_at_operand:
                operands += rest
                break
            continue
        name, equals, value = word[2 if word.startswith("--") else 1 :].partition("=")
        option = known.get(name)
        if option is None and operands:
            operands.append(word)
            continue
        if not name or name.startswith("-"):
            raise OptionError(f"bad flag syntax: {word}")
        if option is None:
            raise OptionError(
                "flag: help requested" if name in ("h", "help") else f"flag provided but not defined: -{name}"
            )
        if option.kind == FLAG:
            values.set(option, name, value if equals else "true")
        elif equals:
            values.set(option, name, value)
        elif rest:
            values.set(option, name, rest.pop(0))
        else:
            raise OptionError(f"flag needs an argument: -{name}")
    return values, operands

"""Write help from the declarations: one line of usage, a page for a command, the overview."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator

from caisson.commands.declare import HELP, Command, Group, Option, Positional

#: Maximum columns of help.
MAX_WIDTH = 100

#: Columns for an option's name; longer ones get their own line.
LEFT = 26


def usage(command: Command) -> str:
    """Format a command's usage on one line."""
    words = ["caisson", command.name]
    if command.options:
        words.append("[OPTIONS]")
    for place in command.positionals:
        dots = f"{place.metavar}…" if place.repeat else place.metavar
        words.append(dots if place.required else f"[{dots}]")
    if command.program:
        program = f"[--] {command.program.metavar} [ARG…]"
        words.append(program if command.program.required else f"[{program}]")
    return " ".join(words)


def help_of(command: Command) -> str:
    """Format the page that `caisson COMMAND --help` shows."""
    width = _width()
    parts = [f"Usage: {usage(command)}", _wrap(command.summary, width)]
    if command.details:
        parts += [_wrap(paragraph, width) for paragraph in command.details.split("\n\n")]
    arguments = [(place.metavar, describe(place)) for place in command.positionals]
    if command.program:
        arguments.append((command.program.metavar, command.program.help))
    if arguments:
        parts.append("Arguments:\n" + _table(arguments, width))
    options = [(_words(option), describe(option)) for option in (*command.options, HELP)]
    parts.append("Options:\n" + _table(options, width))
    if command.examples:
        head = "Examples:" if len(command.examples) > 1 else "Example:"
        parts.append("\n".join([head, *(f"  {line}" for line in command.examples)]))
    return "\n\n".join(parts) + "\n"


def overview(groups: Iterable[Group]) -> str:
    """Format the page that `caisson` alone shows: the commands, in groups."""
    width = _width()
    parts = [
        "Usage: caisson COMMAND [ARGUMENT…]",
        "Build guest images, boot them, and run containers in virtual machines.",
    ]
    for group in groups:
        rows = [(command.name, command.summary.rstrip(".")) for command in group.commands if not command.hidden]
        if rows:
            parts.append(f"{group.title}:\n" + _table(rows, width, left=16))
    parts.append("`caisson COMMAND --help` explains one and shows examples; `caisson --version` prints the version.")
    return "\n\n".join(parts) + "\n"


def describe(option: Option | Positional) -> str:
    """Describe an option with its default and range."""
    facts = []
    kind = option.kind
    if option.shown:
        facts.append(f"default: {option.shown}")
    elif kind and option.default not in (None, ""):
        facts.append(
            f"default: {option.default:g}" if isinstance(option.default, float) else f"default: {option.default}"
        )
    if kind and kind.range:
        facts.append(kind.range)
    if isinstance(option, Option) and option.repeat:
        facts.append("may be repeated")
    return f"{option.help} ({'; '.join(facts)})" if facts else option.help


def _words(option: Option) -> str:
    name = f"-{option.short}, --{option.name}" if option.short else f"    --{option.name}"
    return f"{name} {option.kind.metavar}" if option.kind else name


def _table(rows: Iterable[tuple[str, str]], width: int, left: int = LEFT) -> str:
    return "\n".join(line for words, text in rows for line in _row(words, text, width, left))


def _row(words: str, text: str, width: int, left: int) -> Iterator[str]:
    lines = textwrap.wrap(text, max(width - left - 4, 30), break_long_words=False) or [""]
    if len(words) > left:
        yield f"  {words}"
        words = ""
    for line in lines:
        yield f"  {words:<{left}}  {line}".rstrip()
        words = ""


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)


def _width() -> int:
    return max(40, min(shutil.get_terminal_size().columns, MAX_WIDTH))

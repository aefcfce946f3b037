"""Help of the program and of its commands, in the sections that callers of runc look for."""

from __future__ import annotations

from caisson.agent.runtime.options import FLAG, NUMBER
from caisson.agent.runtime.verbs import GLOBAL, HELP, VERBS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from caisson.agent.runtime.options import RuntimeOption
    from caisson.agent.runtime.verbs import Verb

PROGRAM = """NAME:
   {prog} - Open Container Initiative runtime

Run containers from bundles: directories with a config.json (`{prog} spec` writes one) and a root file system.
There is no daemon; container state is kept below --root.

    # {prog} run -b bundle container-id

USAGE:
   {prog} [global options] command [command options] [arguments...]

VERSION:
   {version}

COMMANDS:
{verbs}

GLOBAL OPTIONS:
{options}
"""


def program(prog: str, version: str) -> str:
    """Write the help of the program."""
    width = max(map(len, VERBS))
    verbs = [f"   {verb.name.ljust(width)}  {verb.help}" for verb in VERBS.values()]
    verbs.append(f"   {'help, h'.ljust(width)}  print this list, or the help of one command")
    return PROGRAM.format(prog=prog, version=version, verbs="\n".join(verbs), options=_options(GLOBAL))


def command(prog: str, verb: Verb) -> str:
    """Write the help of a command."""
    words = [prog, verb.name, "[command options]" if verb.options else "", verb.usage]
    parts = [f"NAME:\n   {prog} {verb.name} - {verb.help}", f"USAGE:\n   {' '.join(filter(None, words))}"]
    if verb.more:
        parts.append(verb.more.replace("PROG", prog))
    parts.append(f"OPTIONS:\n{_options((*verb.options, HELP))}")
    return "\n\n".join(parts) + "\n"


def _options(options: Iterable[RuntimeOption]) -> str:
    rows = []
    for option in options:
        value = "" if option.kind == FLAG else " value"
        names = f"--{option.name}{value}" + (f", -{option.short}{value}" if option.short else "")
        default = option.default if option.kind == NUMBER else f'"{option.default}"' if option.default else None
        rows.append((names, option.help + ("" if default is None else f" (default: {default})")))
    width = max(len(names) for names, _ in rows)
    return "\n".join(f"   {names.ljust(width)}  {text}" for names, text in rows)

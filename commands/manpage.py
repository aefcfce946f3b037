"""Write the manual page caisson(1) from the declarations, in man(7) macros."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from caisson.commands.declare import HELP, Command, Group, Option
from caisson.commands.usage import describe, usage

DESCRIPTION = """Caisson builds guest images, boots them as virtual machines, and runs containers inside them. A VM is a
directory; its agent listens on a Unix socket in it. The first command that needs an image builds one."""

STATUSES = (
    ("0", "The command succeeded."),
    ("1", "The command failed; the reason is on standard error."),
    ("2", "The command line is invalid."),
    (
        "125",
        "exec, run and shell: the program could not be run at all; cp and share: no such container, or it has exited.",
    ),
    ("126", "The program cannot be executed."),
    ("127", "The program was not found."),
    ("128+n", "Signal n killed the program, or this command: 130 for Ctrl-C."),
)

VARIABLES = (
    ("CAISSON_ACCEL", "What --accel auto selects: kvm or tcg."),
    ("CAISSON_VSOCK", "What --vsock auto selects: vhost or user."),
    ("CAISSON_CACHE", "Directory of images and downloads; ~/.cache/caisson if not set."),
    ("CAISSON_CACHE_SIZE", "Bytes that the cache may hold; 4000000000 if not set."),
    ("CAISSON_RUN", "Directory of running VMs; $XDG_RUNTIME_DIR/caisson or /run/caisson if not set."),
    ("CAISSON_SHIM_CONFIG", "Configuration of containerd's shim; /etc/caisson/shim.toml if not set."),
    ("CAISSON_MIRROR", "Mirror of Debian's packages; the one in apt's sources if not set."),
    ("CAISSON_SECURITY_MIRROR", "Mirror of Debian's security updates, or none; beside the other one if not set."),
    ("CAISSON_UBUNTU_MIRROR", "Mirror of Ubuntu's packages."),
    ("CAISSON_UBUNTU_KEYRING", "File with the keys that sign them."),
    ("CAISSON_ALPINE_MIRROR", "Mirror of Alpine's packages."),
    ("CAISSON_ALPINE_KEYS", "Directory of the keys that sign their index; /etc/apk/keys if not set."),
    ("CAISSON_MAX_INDEX_AGE", "Days after which that index is rejected; 365 if not set."),
    ("CAISSON_DEBUG", "If set, errors are shown with a traceback."),
)


def manual(groups: Iterable[Group], version: str) -> str:
    """Format the page in man(7) macros."""
    lines = [f'.TH CAISSON 1 "" "caisson {version}" "User Commands"']
    lines += [".SH NAME", "caisson \\- build guest images, boot them, run containers in virtual machines"]
    lines += [".SH SYNOPSIS", ".B caisson", ".I COMMAND", "[\\fIARGUMENT\\fR…]", ".SH DESCRIPTION", text(DESCRIPTION)]
    for group in groups:
        commands = [command for command in group.commands if not command.hidden]
        if commands:
            lines.append(f".SH {group.title.upper()}")
            for command in commands:
                lines += _command(command)
    for title, rows in (("EXIT STATUS", STATUSES), ("ENVIRONMENT", VARIABLES)):
        lines.append(f".SH {title}")
        for word, meaning in rows:
            lines += [".TP", f".B {text(word)}", text(meaning)]
    return "\n".join(lines) + "\n"


def text(written: str) -> str:
    """Escape a text for roff; code between backquotes is bold."""
    escaped = " ".join(written.split()).replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    escaped = re.sub(r"`([^`]*)`", r"\\fB\1\\fR", escaped)
    return f"\\&{escaped}" if escaped.startswith((".", "\\(aq")) else escaped


def _command(command: Command) -> Iterator[str]:
    yield f".SS {text(usage(command))}"
    yield text(command.summary)
    for paragraph in command.details.split("\n\n") if command.details else ():
        yield ".PP"
        yield text(paragraph)
    for place in command.positionals:
        yield from (".TP", f".I {text(place.metavar)}", text(describe(place)))
    if command.program:
        yield from (".TP", f".I {text(command.program.metavar)}", text(command.program.help))
    for option in (*command.options, HELP):
        yield from (".TP", _option(option), text(describe(option)))
    if command.examples:
        yield from (".PP", "Example:" if len(command.examples) == 1 else "Examples:", ".PP", ".nf", ".RS 4")
        yield from (text_of_code(line) for line in command.examples)
        yield from (".RE", ".fi")


def text_of_code(line: str) -> str:
    """Escape a line to be shown verbatim."""
    escaped = line.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return f"\\&{escaped}"


def _option(option: Option) -> str:
    names = [f"\\fB\\-{option.short}\\fR"] if option.short else []
    names.append(f"\\fB{text('--' + option.name)}\\fR")
    value = f" \\fI{text(option.kind.metavar)}\\fR" if option.kind else ""
    return ", ".join(names) + value

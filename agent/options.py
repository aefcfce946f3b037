"""The agent's options: from its command line, in a guest from the kernel's (agent.name=value), or from a TOML file.

Each option is declared once, below; all three sources, their help and their errors derive from that.
"""

from __future__ import annotations

import re

from caisson.agent.base.log import LEVELS
from caisson.proto.contract import AGENT_PORT, GUEST_HOME, TRACE_PORT
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Options(Record):
    """Addresses are ``vsock:PORT`` or ``unix:PATH``, empty for none."""

    listen: str = f"vsock:{AGENT_PORT}"
    nsexec: str = f"{GUEST_HOME}/nsexec"
    state: str = "/run/libcontainer"
    log: str = "info"
    log_listen: str = ""
    console_listen: str = ""
    console: bool = False
    pipe_size: int = 0
    hotplug_timeout: float = 3.0
    cgroup: str = "v2"
    cgroup_parent: str = ""
    trace: bool = False
    trace_target: str = f"vsock:{TRACE_PORT}"
    timeline: bool = False
    warm_up: bool = False
    complaints: tuple[str, ...] = ()


#: Kata's other names for levels.
SYNONYMS = {"warn": "warning", "panic": "fatal"}
TRUE, FALSE = ("1", "t", "T", "TRUE", "true", "True"), ("0", "f", "F", "FALSE", "false", "False")
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def _level(text: str) -> str:
    level = SYNONYMS.get(text, text)
    if level not in LEVELS:
        raise ValueError(f"must be one of {', '.join(LEVELS)}")
    return level


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError("must be a number")
    return int(text)


def _flag(text: str) -> bool:
    if text not in TRUE + FALSE:
        raise ValueError("must be true or false")
    return text in TRUE


def _version(text: str) -> str:
    if text not in ("v1", "v2"):
        raise ValueError("must be v1 or v2")
    return text


def _unified(text: str) -> str:
    return "v2" if _flag(text) else "v1"


def _tracing(text: str) -> bool:
    return text == "isolated" or _flag(text)


def _port(text: str) -> str:
    """Parse a port of the guest as an address; 0 is none."""
    port = _number(text)
    if port >= 1 << 32:
        raise ValueError("must be a 32-bit vsock port")
    return f"vsock:{port}" if port else ""


def _duration(text: str) -> float:
    """Parse a duration as Go writes it, 1m30s or 500ms, into seconds."""
    parts = re.findall(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(h|ms|m|s|us|µs|ns)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("must be a duration like 3s, 500ms or 1m30s")
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if seconds <= 0:
        raise ValueError("must be longer than zero")
    return seconds


class _Option(Record):
    """`name` is its name on the kernel's command line and in a file, `argument` on the agent's own command line."""

    field: str
    parse: Callable[[str], object]
    help: str
    argument: str = ""
    name: str = ""


OPTIONS = (
    _Option("listen", str, "vsock:PORT or unix:PATH", argument="--listen"),
    _Option("nsexec", str, "the nsexec program", argument="--nsexec"),
    _Option("state", str, "directory for the state of containers", argument="--state"),
    _Option("log", _level, "lowest level that is logged", argument="--log", name="log"),
    _Option(
        "log_listen",
        str,
        "serve the log to clients that connect here: vsock:PORT or unix:PATH",
        argument="--log-listen",
    ),
    _Option("log_listen", _port, "the vsock port of the log", name="log_vport"),
    _Option(
        "console_listen",
        str,
        "serve a shell to clients that connect here: vsock:PORT or unix:PATH",
        argument="--debug-console",
    ),
    _Option("console_listen", _port, "the vsock port of the debug console", name="debug_console_vport"),
    _Option("console", _flag, "run a shell on /dev/console", name="debug_console"),
    _Option(
        "pipe_size",
        _number,
        "bytes in the pipes of standard output and error; 0 for the kernel's choice, and more for streams read in bulk",
        argument="--container-pipe-size",
        name="container_pipe_size",
    ),
    _Option(
        "hotplug_timeout",
        _duration,
        "how long to wait for a device",
        argument="--hotplug-timeout",
        name="hotplug_timeout",
    ),
    _Option("cgroup", _version, "version of cgroups for containers: v1 or v2", argument="--cgroup"),
    _Option("cgroup", _unified, "use cgroup v2", name="unified_cgroup_hierarchy"),
    _Option("trace", _tracing, "trace requests from the start", argument="--trace", name="trace"),
    _Option("trace_target", str, "send traces here: vsock:PORT on the host, or unix:PATH", argument="--trace-target"),
    _Option("trace_target", _port, "vsock port on the host to send traces to", name="trace_vport"),
    _Option("timeline", _flag, "time the imports during startup", name="timeline"),
    _Option("warm_up", _flag, "start and end a pod before a guest is saved", name="warm_up"),
    _Option("cgroup_parent", str, "the parent of all other cgroups", argument="--cgroup-parent"),
)
BY_NAME = {option.name: option for option in OPTIONS if option.name}

#: Options of Kata agents with another meaning here, or none; an unsupported value is reported.
UNDERSTOOD: dict[str, tuple[Callable[[str], object], object, str]] = {
    "use_vsock": (_flag, True, "serial ports are not supported; use vsock"),
}


def kernel_words() -> list[str]:
    """Read the kernel's command line."""
    with open("/proc/cmdline") as file:  # noqa: PTH123 - no pathlib at start
        return file.read().split()


def from_kernel(words: Iterable[str], options: Options | None = None) -> Options:
    """Read options from the kernel's command line, and from the file that it names with agent.config_file.

    An invalid value or an unknown option is only reported in the log: a typo should not keep a guest from booting.
    """
    pairs = [word.removeprefix("agent.").partition("=") for word in words if word.startswith("agent.")]
    options = options or Options()
    for name, _, value in pairs:
        if name == "config_file":
            options = from_file(value, options)
    return _apply(
        ((name, value if equals else "true") for name, equals, value in pairs if name != "config_file"), options
    )


def from_file(path: str, options: Options) -> Options:
    """Read options from a TOML file: the names of the kernel's command line without "agent.".

    What is unreadable or invalid is reported.
    """
    import tomllib

    try:
        with open(path, "rb") as file:  # noqa: PTH123 - no pathlib at start
            found = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        return options.but(complaints=(*options.complaints, f"the configuration {path} cannot be read: {error}"))
    spelled = ((name, str(value).lower() if isinstance(value, bool) else str(value)) for name, value in found.items())
    return _apply(spelled, options)


def _apply(pairs: Iterable[tuple[str, str]], options: Options) -> Options:
    complaints = list(options.complaints)
    for name, value in pairs:
        option = BY_NAME.get(name)
        try:
            if option is not None:
                options = options.but(**{option.field: option.parse(value)})
            elif name == "devmode":
                options = options.but(log="debug")
            elif name in UNDERSTOOD:
                parse, wanted, complaint = UNDERSTOOD[name]
                if parse(value) != wanted:
                    complaints.append(f"agent.{name}={value}: {complaint}")
            else:
                complaints.append(f"Unknown option agent.{name}")
        except ValueError as error:
            complaints.append(f"agent.{name}={value}: invalid value: {error}")
    return options.but(complaints=tuple(complaints))


def from_arguments(arguments: list[str]) -> Options:
    """Read the options of an agent that is not PID 1.  Exits with a message on an invalid argument."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m caisson.agent",
        description="Run containers on this machine, driven over gRPC.",
        epilog="example: python -m caisson.agent --listen unix:/tmp/agent.sock --nsexec build/nsexec --state /tmp/s",
    )
    parser.add_argument("--config", help="a TOML file with options by their names on the kernel's command line")
    parser.add_argument(
        "--kernel-options", action="store_true", help="also take agent.NAME=VALUE from the kernel's command line"
    )
    default = Options()
    for option in OPTIONS:
        if option.argument:
            value = getattr(default, option.field)
            text = f"{option.help} (default: {value if value != '' else 'none'})"
            parser.add_argument(option.argument, dest=option.field, help=text)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    options = from_file(given.pop("config"), default) if "config" in given else default
    if given.pop("kernel_options"):
        options = from_kernel(kernel_words(), options)
    for option in OPTIONS:
        if option.argument and option.field in given:
            try:
                options = options.but(**{option.field: option.parse(given[option.field])})
            except ValueError as error:
                parser.error(f"{option.argument} {given[option.field]}: {error}")
    return options

"""What the agent is told: by its command line, and in a guest by the kernel's (agent.name=value)."""

from __future__ import annotations

from agent.log import LEVELS
from agent.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: Kata's other names for levels.
SYNONYMS = {"warn": "warning", "panic": "fatal"}

#: Options of Kata agents that this one does not have yet.  Their absence is said, not passed over.
NOT_YET = (
    "agent.debug_console",
    "agent.debug_console_vport",
    "agent.devmode",
    "agent.hotplug_timeout",
    "agent.log_vport",
    "agent.trace",
    "agent.use_vsock",
)

TRUE, FALSE = ("1", "t", "T", "TRUE", "true", "True"), ("0", "f", "F", "FALSE", "false", "False")


class Options(Record):
    """``listen`` is ``vsock:PORT`` or ``unix:PATH``; ``pipe_size`` in bytes, 0 for the kernel's choice.

    ``cgroup_parent`` is where in the hierarchy the containers' cgroups are made; empty: at its root.
    """

    listen: str = "vsock:1024"
    nsexec: str = "/usr/lib/caisson/nsexec"
    state: str = "/run/libcontainer"
    log: str = "info"
    pipe_size: int = 0
    cgroup_parent: str = ""
    complaints: tuple[str, ...] = ()


def from_kernel(words: Iterable[str], options: Options | None = None) -> Options:
    """Options from the kernel's command line.

    A value that makes no sense and an option that is not known are complaints, for the log: a guest that does not boot
    over a typo helps nobody.
    """
    options = options or Options()
    complaints: list[str] = []
    for word in words:
        name, _, value = word.partition("=")
        if not name.startswith("agent."):
            continue
        if name == "agent.log" and SYNONYMS.get(value, value) in LEVELS:
            options = options.but(log=SYNONYMS.get(value, value))
        elif name == "agent.container_pipe_size" and value.isascii() and value.isdecimal():
            options = options.but(pipe_size=int(value))
        elif name == "agent.unified_cgroup_hierarchy" and value in TRUE:
            pass  # the only hierarchy that there is
        elif name == "agent.unified_cgroup_hierarchy" and value in FALSE:
            complaints.append(f"{word}: cgroup v1 is not supported yet; it is v2")
        elif name in ("agent.log", "agent.container_pipe_size", "agent.unified_cgroup_hierarchy"):
            complaints.append(f"{word}: the value makes no sense")
        elif name in NOT_YET:
            complaints.append(f"{word}: not supported yet")
        else:
            complaints.append(f"Unknown option {name}")
    return options.but(complaints=tuple(complaints))


def from_arguments(arguments: list[str]) -> Options:
    """Options from the command line of an agent that is not PID 1.  Exits with a message for what it does not know."""
    import argparse

    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m agent",
        description="Run containers on this machine, driven over gRPC.",
        epilog="example: python -m agent --listen unix:/tmp/agent.sock --nsexec build/nsexec --state /tmp/state",
    )
    parser.add_argument("--listen", default=default.listen, help="vsock:PORT or unix:PATH (default: %(default)s)")
    parser.add_argument("--nsexec", default=default.nsexec, help="the nsexec program (default: %(default)s)")
    parser.add_argument("--state", default=default.state, help="where containers are kept (default: %(default)s)")
    parser.add_argument("--log", default=default.log, choices=LEVELS, help="least level logged (default: %(default)s)")
    parser.add_argument("--cgroup-parent", default="", help="the cgroup that all others are made in")
    return Options(**vars(parser.parse_args(arguments)))

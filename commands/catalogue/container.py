"""Commands for existing containers."""

from __future__ import annotations

from caisson.commands.catalogue.shared import JSON, VM
from caisson.commands.declare import CONTAINER, Command, Kind, Option, Positional, integer, name, seconds

ONE = Positional("container", "name of the container", CONTAINER)
ONE_OR_ALL = Positional("container", "only this one", CONTAINER, default="", optional=True, shown="all of them")

_INTERVAL: Kind = seconds(0.01, 3600)

COMMANDS = (
    Command(
        "ps",
        "List the processes of containers.",
        "caisson.commands.container:ps",
        details="Process IDs are the guest's; a paused container says so.",
        positionals=(ONE_OR_ALL,),
        options=(
            Option("all", "also list exited containers, with their exit status", short="a", dest="everything"),
            VM,
            JSON,
        ),
        examples=("caisson ps", "caisson ps --all", "caisson ps web --json"),
        is_short=True,
    ),
    Command(
        "stats",
        "Show the CPU, memory and process usage of containers.",
        "caisson.commands.container:stats",
        positionals=(ONE_OR_ALL,),
        options=(VM, Option("interval", "measure CPU usage over this interval", _INTERVAL, default=1.0), JSON),
        examples=("caisson stats --interval 5", "caisson stats web --json"),
        is_short=True,
    ),
    Command(
        "kill",
        "Send a signal to a container.",
        "caisson.commands.container:kill",
        positionals=(ONE,),
        options=(
            Option("signal", "name or number of the signal", name("SIGNAL", "HUP"), default="TERM", short="s"),
            Option("all", "signal all its processes, not only the init process", dest="everything"),
            VM,
        ),
        examples=("caisson kill web --signal HUP",),
        is_short=True,
    ),
    Command(
        "pause",
        "Freeze all processes of a container.",
        "caisson.commands.container:pause",
        positionals=(ONE,),
        options=(VM,),
        examples=("caisson pause web",),
        is_short=True,
    ),
    Command(
        "resume",
        "Resume a paused container.",
        "caisson.commands.container:resume",
        positionals=(ONE,),
        options=(VM,),
        examples=("caisson resume web",),
        is_short=True,
    ),
    Command(
        "rm",
        "Kill a container and remove it.",
        "caisson.commands.container:rm",
        positionals=(ONE,),
        options=(
            Option("timeout", "seconds to wait until it has exited; 0 waits forever", integer(0, 86400), default=30),
            VM,
        ),
        examples=("caisson rm web",),
        is_short=True,
    ),
    Command(
        "start",
        "Restart an exited container: run its program again, on the files that it left.",
        "caisson.commands.container:start",
        details="It runs in the background; `caisson logs` shows its output since then.",
        positionals=(ONE,),
        options=(VM,),
        examples=("caisson start web",),
        is_short=True,
    ),
    Command(
        "wait",
        "Wait until a container exits, and print its exit status.",
        "caisson.commands.container:wait",
        positionals=(ONE,),
        options=(VM,),
        examples=("caisson wait web",),
        is_short=True,
    ),
    Command(
        "attach",
        "Attach to a detached container's input and output, until it exits or, on a terminal, Ctrl-P Ctrl-Q is typed.",
        "caisson.commands.container:attach",
        details="The exit status is the container's; `caisson logs` shows its earlier output.",
        positionals=(ONE,),
        options=(VM,),
        examples=("caisson attach web",),
    ),
)

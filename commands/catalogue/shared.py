"""Options that several commands have."""

from __future__ import annotations

from caisson.commands.declare import CONTAINER, TEXT, VM_NAME, Kind, Option, choice, memory, name, setting

#: What a guest can have: less does not boot, more no machine has.
MEMORY = memory(128, 16 << 20)

VM = Option("name", "the VM", VM_NAME, default="default", short="n")
VM_OR_OWN = Option(
    "name", "the VM", VM_NAME, default="", short="n", shown="the running VM `default`, else one booted for this command"
)
IN_CONTAINER = Option(
    "container", "the container; `default` is made on first use and kept", CONTAINER, default="default", short="c"
)
JSON = Option("json", "print JSON", dest="as_json")
ENV = Option(
    "env", "set a variable of the program's environment", setting("NAME=value", "TERM=xterm"), repeat=True, short="e"
)
NETWORK = Option(
    "network", "what network a VM booted for this command has", choice("none", "user"), default="",
    shown="none; user with --publish",
)  # fmt: skip
PUBLISH = Option(
    "publish", "lead a port of this machine to a port of a VM booted for this command",
    name("[ADDR:]PORT:PORT[/udp]", "8080:80"), repeat=True, short="p",
)  # fmt: skip
VERBOSE = Option("verbose", "show progress, also when stderr is not a terminal", short="v")
TTY = Option("tty", "give the program a terminal", short="t")
INTERACTIVE = Option("interactive", "pass standard input on, as is always done; for fingers used to -it", short="i")
ACCEL = Option(
    "accel", "how the CPU is run; auto chooses by evidence and says why", choice("auto", "kvm", "tcg"), default="auto"
)
VSOCK = Option(
    "vsock", "vhost is the kernel's device, user our own; auto chooses by evidence", choice("auto", "vhost", "user"),
    default="auto",
)  # fmt: skip
APPEND = Option(
    "append",
    "add to the kernel's command line",
    Kind("TEXT", TEXT.read, "agent.log=debug"),
    default="",
    shown="nothing",
)

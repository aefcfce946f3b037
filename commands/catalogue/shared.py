"""Options shared by several commands."""

from __future__ import annotations

from caisson.commands.declare import CONTAINER, TEXT, VM_NAME, Kind, Option, choice, memory, name, setting

#: A guest with less does not boot; no machine has more.
MEMORY = memory(128, 16 << 20)

VM = Option("name", "the VM", VM_NAME, default="default", short="n")
VM_OR_OWN = Option(
    "name",
    "the VM",
    VM_NAME,
    default="",
    short="n",
    shown="the running VM `default`, otherwise one booted for this command",
)
IN_CONTAINER = Option(
    "container", "the container; `default` is created on first use and kept", CONTAINER, default="default", short="c"
)
JSON = Option("json", "print JSON", dest="as_json")
ENV = Option(
    "env", "set an environment variable for the program", setting("NAME=value", "TERM=xterm"), repeat=True, short="e"
)
NETWORK = Option(
    "network", "network of a VM booted for this command", choice("none", "user"), default="",
    shown="none; user with --publish",
)  # fmt: skip
PUBLISH = Option(
    "publish", "publish a port of a VM booted for this command on this machine",
    name("[ADDR:]PORT:PORT[/udp]", "8080:80"), repeat=True, short="p",
)  # fmt: skip
VERBOSE = Option("verbose", "show progress even if stderr is not a terminal", short="v")
TTY = Option("tty", "allocate a terminal for the program", short="t")
INTERACTIVE = Option("interactive", "accepted for compatibility (-it): standard input is always passed on", short="i")
ACCEL = Option(
    "accel", "accelerator; auto detects what works and says why", choice("auto", "kvm", "tcg"), default="auto"
)
VSOCK = Option(
    "vsock", "vsock device: the kernel's (vhost) or our own (user); auto detects what works",
    choice("auto", "vhost", "user"), default="auto",
)  # fmt: skip
APPEND = Option(
    "append",
    "append to the kernel command line",
    Kind("TEXT", TEXT.read, "agent.log=debug"),
    default="",
    shown="nothing",
)

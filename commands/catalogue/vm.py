"""Commands for virtual machines."""

from __future__ import annotations

from caisson.commands.catalogue.shared import ACCEL, APPEND, JSON, MEMORY, VM, VSOCK
from caisson.commands.declare import (
    CONTAINER,
    DIRECTORY,
    FILE,
    SNAPSHOT,
    TEXT,
    VM_NAME,
    Command,
    Option,
    Positional,
    choice,
    integer,
    name,
    seconds,
    setting,
)

CPUS = integer(1, 255)

BOOT_VM = Command(
    "boot-vm",
    "Boot a VM and wait for its agent.",
    "caisson.commands.boot:boot_vm",
    details="Shows the VM's console until Ctrl-C, which stops it; with --detach it is left running in the background.",
    positionals=(Positional("name", "name of the VM; also --name", VM_NAME, default="default"),),
    options=(
        Option("detach", "leave it running in the background", short="d"),
        Option("image", "directory of an image", DIRECTORY, default="", shown="the default image, built if needed"),
        Option("snapshot", "clone a snapshot (see save-snapshot), in the state it was saved in", SNAPSHOT, default=""),
        Option("memory", "memory of the VM; without a unit: MiB", MEMORY, shown="512M", short="m"),
        Option("cpus", "virtual CPUs", CPUS, shown="1"),
        Option("max-memory", "maximum memory with hotplug", MEMORY, shown="no hotplug"),
        Option("max-cpus", "maximum virtual CPUs with hotplug", CPUS, shown="no hotplug"),
        Option(
            "share", "share a directory of this machine, for the guest to mount; :rw makes it writable",
            setting("TAG=DIR[:rw]", "src=./src"), repeat=True,
        ),
        Option(
            "network", "give the VM a network: user can reach whatever this user can, without root",
            choice("none", "user"), default="", shown="none; user with --publish",
        ),
        Option(
            "publish", "publish a port of the VM on this machine", name("[ADDR:]PORT:PORT[/udp]", "8080:80"),
            repeat=True, short="p",
        ),
        APPEND,
        ACCEL,
        VSOCK,
        Option("timeout", "wait this long for the agent", seconds(), default=0.0, shown="60 with KVM, 240 with TCG"),
        Option(
            "timeline", "write where the boot time went, as .svg or .json; measuring costs about 2 %", FILE,
            default="",
        ),
        Option("dry-run", "print QEMU's command line, quoted for a shell, and start nothing; the reasons go to stderr"),
        Option("json", "with --dry-run: print the command line as a JSON list", dest="as_json"),
    ),
    examples=(
        "caisson boot-vm --detach",
        "caisson boot-vm web --memory 1G --cpus 2 --detach",
        "caisson boot-vm --detach --timeline boot.svg",
        "caisson boot-vm web --detach --network user --publish 8080:80",
    ),
)  # fmt: skip

COMMANDS = (
    BOOT_VM,
    Command(
        "stop-vm",
        "Stop a VM: its containers, then the machine.",
        "caisson.commands.vm:stop_vm",
        positionals=(Positional("name", "name of the VM; also --name", VM_NAME, default="default"),),
        options=(Option("all", "stop every VM", dest="everything"),),
        examples=("caisson stop-vm web", "caisson stop-vm --all"),
        is_short=True,
    ),
    Command(
        "list-vms",
        "List the running VMs.",
        "caisson.commands.vm:list_running",
        options=(JSON,),
        examples=("caisson list-vms", "caisson list-vms --json"),
        is_short=True,
    ),
    Command(
        "logs",
        "Show a detached container's output, or a guest's console: kernel messages and the agent's log.",
        "caisson.commands.vm:logs",
        positionals=(Positional("container", "the container", CONTAINER, default="", optional=True, shown="console"),),
        options=(
            Option("agent", "only the agent's lines, as JSON objects", dest="only_agent"),
            Option("follow", "follow until the container exits or the VM stops", short="f"),
            Option("since", "only output since then: 10m (ago), or a date", TEXT, default="", shown="all"),
            Option("tail", "only the last lines", integer(0, 1 << 30), shown="all"),
            VM,
        ),
        examples=("caisson logs --agent --follow", "caisson logs web --since 10m --tail 100"),
        is_short=True,
    ),
    Command(
        "balloon",
        "Take memory from a running guest, or give it back, and print how many MiB it then has.",
        "caisson.commands.vm:balloon",
        details="""The guest keeps what it needs. With our own kernel (template lean), it returns free memory by
            itself.""",
        positionals=(
            Positional(
                "size", "memory that the guest keeps, at most what it was booted with; without a unit: MiB", MEMORY
            ),
        ),
        options=(VM,),
        examples=("caisson balloon 256M",),
    ),
)  # fmt: skip

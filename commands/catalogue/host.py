"""Commands for this machine and this command line."""

from __future__ import annotations

from caisson.commands.catalogue.shared import ACCEL, JSON, MEMORY, VSOCK
from caisson.commands.catalogue.vm import CPUS
from caisson.commands.declare import DIRECTORY, FILE, SNAPSHOT, Command, Option, Positional, Program, choice, name

HYPERVISOR = Command(
    "hypervisor",
    "Run VMs for the pods of a Kata 3.x shim, as its remote hypervisor, on a Unix socket until SIGTERM.",
    "caisson.commands.hypervisor:hypervisor",
    details="""A pod's VM is a clone of the snapshot if that is large enough, otherwise it is booted from the image. It
        gets the files that the shim shares, by virtiofs, and the interfaces of the pod's network namespace. It stops
        with its shim, and with this command, which logs each start and stop to stderr as a JSON line. Needs root.""",
    options=(
        Option("socket", "listen here: remote_hypervisor_socket in Kata's configuration", FILE,
               default="/run/peerpod/hypervisor.sock", short="s"),
        Option("snapshot", "clone this snapshot", SNAPSHOT, default="", shown="install-shim's, if it exists"),
        Option("image", "directory of an image", DIRECTORY, default="", shown="the snapshot's, or the default image"),
        Option("memory", "memory of a VM, unless its shim asks for more; without a unit: MiB", MEMORY, short="m",
               shown="the snapshot's, or 512M"),
        Option("cpus", "virtual CPUs of a VM, unless its shim asks for more", CPUS, shown="the snapshot's, or 1"),
        ACCEL,
        VSOCK,
    ),
    examples=(
        "sudo caisson install-shim && sudo caisson hypervisor",
        "sudo caisson hypervisor --socket /run/caisson.sock --snapshot small",
    ),
)  # fmt: skip

COMMANDS = (
    Command(
        "doctor",
        "Check what this machine supports and what is missing, with the command that fixes each problem.",
        "caisson.commands.host:doctor",
        details="The exit status is 1 if something is missing that is needed to build or boot guests.",
        options=(JSON,),
        examples=("caisson doctor", "caisson doctor --json"),
    ),
    Command(
        "report",
        "Collect what a bug report needs: versions, doctor's findings, the state and last output of VMs.",
        "caisson.commands.host:report",
        details="""It contains no environment variables but CAISSON_*, no command lines of programs and no files from
            containers. Passwords are removed where they can be recognized; review it before you send it.""",
        options=(Option("output", "write the archive here", FILE, default="caisson-report.tar.gz", short="o"),),
        examples=("caisson report",),
    ),
    HYPERVISOR,
    Command(
        "completion",
        "Print a completion script for a shell.",
        "caisson.commands.host:completion",
        positionals=(Positional("shell", "bash, zsh or fish", choice("bash", "zsh", "fish")),),
        examples=(
            "source <(caisson completion bash)      # or zsh, in ~/.bashrc or ~/.zshrc",
            "caisson completion fish | source",
        ),
    ),
    Command(
        "help",
        "List the commands, or explain one.",
        run="",
        positionals=(
            Positional("command", "the command to explain", name("COMMAND", "exec"), default="", optional=True),
        ),
        options=(Option("man", "print the manual page caisson(1) instead"),),
        examples=("caisson help boot-vm", "caisson help --man | man -l -"),
    ),
    Command(
        "complete",
        "Print the possible next words, for shell completion.",
        run="",
        program=Program("the words after `caisson`, up to the one to complete", metavar="WORD", required=False),
        hidden=True,
    ),
)

"""Commands about this machine and this command line."""

from __future__ import annotations

from caisson.commands.catalogue.shared import JSON
from caisson.commands.declare import FILE, Command, Option, Positional, Program, choice, name

COMMANDS = (
    Command(
        "doctor",
        "Check what this machine can do and what it lacks, with the command that mends each.",
        "caisson.commands.host:doctor",
        details="The exit status is 1 if something is missing without which no guest can be built or booted.",
        options=(JSON,),
        examples=("caisson doctor", "caisson doctor --json"),
    ),
    Command(
        "report",
        "Pack what a bug report needs: versions, doctor's findings, the state and last output of VMs.",
        "caisson.commands.host:report",
        details="It holds no environment, no command lines of programs and no files of containers.",
        options=(Option("output", "write the archive here", FILE, default="caisson-report.tar.gz", short="o"),),
        examples=("caisson report",),
    ),
    Command(
        "completion",
        "Print the completion of this command line for a shell.",
        "caisson.commands.host:completion",
        positionals=(Positional("shell", "bash, zsh or fish", choice("bash", "zsh", "fish")),),
        examples=(
            "source <(caisson completion bash)      # or zsh, in ~/.bashrc or ~/.zshrc",
            "caisson completion fish | source",
        ),
    ),
    Command(
        "help",
        "Show the commands, or explain one.",
        run="",
        positionals=(
            Positional("command", "the command to explain", name("COMMAND", "exec"), default="", optional=True),
        ),
        options=(Option("man", "print the manual page caisson(1) instead"),),
        examples=("caisson help boot-vm", "caisson help --man | man -l -"),
    ),
    Command(
        "complete",
        "Print what can follow these words, for the shells' completion.",
        run="",
        program=Program("the words after `caisson`, up to the one to complete", metavar="WORD", required=False),
        hidden=True,
    ),
)

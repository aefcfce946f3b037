"""Commands about this machine and this command line."""

from __future__ import annotations

from caisson.commands.declare import Command, Option, Positional, Program, choice, name

COMMANDS = (
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

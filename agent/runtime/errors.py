"""The failure of a command, and error messages as callers of runc match them."""

from __future__ import annotations

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.errors import LaunchError, reason

INIT = "unable to start container process: error during container init:"


class CommandError(Exception):
    """A command that failed; str() is the message that callers match."""


def is_of_program(error: BaseException) -> bool:
    """Return whether it is a failure of execve(2), after everything else succeeded."""
    return isinstance(error, LaunchError) and error.step == "execve"


def sentence(error: BaseException) -> str:
    """Write the message of an error, without the command's own prefix."""
    if isinstance(error, LaunchError):
        return launch(error)
    if isinstance(error, OSError) and not isinstance(error, SpecError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{(error.strerror or str(error)).lower()}"
    if isinstance(error, SpecError):
        return spec(error)
    return str(error)


def spec(error: SpecError) -> str:
    """Write the message for an invalid configuration."""
    field, why = error.field, error.why
    if field.startswith("linux.sysctl[") and ("namespace" in why):
        return f'sysctl "{field.removeprefix("linux.sysctl[").removesuffix("]")}" is not in a separate kernel namespace'
    if field == "process.env":
        return f"{INIT} invalid environment variable: {why}"
    return str(error)


def launch(error: LaunchError) -> str:
    """Write the message for a process that could not be started."""
    if error.step == "start":
        return str(error)
    if error.step == "execve":  # after the start: the process's own error
        return str(error)
    if error.step == "lookup" or " hook #" in error.step:
        return f"unable to start container process: {error}"
    if error.step == "cwd" and error.errno:
        why = f'chdir to cwd ("{error.path}") set in config.json failed: {reason(error.errno)}'
        return f"unable to start container process: {why}"
    return f"{INIT} {error}"

"""The sentences of errors, as callers of runc match them."""

from __future__ import annotations

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.errors import LaunchError

#: Steps whose words are about the program itself, not about the container's set-up.
OF_THE_PROGRAM = ("lookup", "execve")


def sentence(error: BaseException) -> str:
    """Write the message of an error, without the command's own prefix."""
    if isinstance(error, LaunchError):
        return launch(error)
    if isinstance(error, OSError) and not isinstance(error, SpecError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{(error.strerror or str(error)).lower()}"
    return str(error)


def launch(error: LaunchError) -> str:
    """Write why a process could not be started."""
    if error.step == "start":
        return str(error)
    if error.step == "execve":  # after the start: the process's own error
        return str(error)
    if error.step == "lookup" or " hook #" in error.step:
        return f"unable to start container process: {error}"
    return f"unable to start container process: error during container init: {error}"

"""The detail of an error for programs: a reason from caisson.proto, and this agent's own message.

Kata's hosts look at codes and texts, which differ between API generations; our clients look at these.
"""

from __future__ import annotations

import errno

from caisson.agent.base import errors
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.state import PAUSED, STOPPED
from caisson.agent.rpc.dispatch import bounded
from caisson.proto.caisson import caisson_pb2

#: The full name of the message in a status's details.
NAME = caisson_pb2.DESCRIPTOR.message_types_by_name["ErrorDetails"].full_name

REASONS = {
    errors.ContainerNotFound: caisson_pb2.CONTAINER_NOT_FOUND,
    errors.ProcessNotFound: caisson_pb2.PROCESS_NOT_FOUND,
    errors.NotRunning: caisson_pb2.CONTAINER_STOPPED,
    errors.NotStopped: caisson_pb2.CONTAINER_RUNNING,
    errors.OutputNotKept: caisson_pb2.OUTPUT_NOT_KEPT,
    errors.EndOfStream: caisson_pb2.END_OF_OUTPUT,
}

#: For a container that accepts no process now, by its status.
CANNOT_EXEC = {STOPPED: caisson_pb2.CONTAINER_STOPPED, PAUSED: caisson_pb2.CONTAINER_PAUSED}

#: For a program that is not found or not executable, as in shells (127 and 126).
LOOKUP = {
    errno.ENOENT: caisson_pb2.PROGRAM_NOT_FOUND,
    errno.EACCES: caisson_pb2.PROGRAM_NOT_EXECUTABLE,
    errno.EISDIR: caisson_pb2.PROGRAM_NOT_EXECUTABLE,
}


def detail_of(error: Exception) -> tuple[str, bytes] | None:
    """Return a caisson.ErrorDetails, by its name and encoded; None if the status says everything."""
    reason = _reason(error)
    text = bounded(str(error)) if isinstance(error, errors.ModelError) else ""
    if not reason and not text:
        return None
    return NAME, caisson_pb2.ErrorDetails(reason=reason, text=text).SerializeToString()


def _reason(error: Exception) -> caisson_pb2.Reason:
    if isinstance(error, errors.CannotExec):
        return CANNOT_EXEC.get(str(error.fields.get("status")), caisson_pb2.UNSPECIFIED)
    if isinstance(error, LaunchError) and error.step == "lookup":
        return LOOKUP.get(error.errno, caisson_pb2.UNSPECIFIED)
    return next((REASONS[kind] for kind in type(error).__mro__ if kind in REASONS), caisson_pb2.UNSPECIFIED)

"""Errors of the model → gRPC status codes.  Hosts compare some of the texts, so those are passed on as they are."""

from __future__ import annotations

import errno
import os

from caisson.agent.base import errors
from caisson.agent.libcontainer.cgroups import CgroupError
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.rpc.codes import StatusCode

CODES: dict[type[Exception], StatusCode] = {
    errors.NotFound: StatusCode.NOT_FOUND,
    errors.AlreadyExists: StatusCode.ALREADY_EXISTS,
    errors.WrongState: StatusCode.FAILED_PRECONDITION,
    errors.Invalid: StatusCode.INVALID_ARGUMENT,
    errors.Unsupported: StatusCode.UNIMPLEMENTED,
    errors.TooLate: StatusCode.DEADLINE_EXCEEDED,
    errors.Failed: StatusCode.INTERNAL,
    # Kata 1.x has no status for these: whatever its handlers return as a plain error is UNKNOWN.
    errors.Refused: StatusCode.UNKNOWN,
    errors.EndOfStream: StatusCode.UNKNOWN,
    errors.BrokenStream: StatusCode.UNKNOWN,
    errors.Ended: StatusCode.UNKNOWN,
    SpecError: StatusCode.INVALID_ARGUMENT,
    LaunchError: StatusCode.INTERNAL,
    CgroupError: StatusCode.INTERNAL,
}


#: The guest has no more of something; no bug, and no fault of the request.  A cgroup's ENOSPC and EAGAIN mean others.
USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
SCARCE = (*USED_UP, errno.ENOSPC, errno.EAGAIN)


def status_of(error: Exception) -> tuple[StatusCode, str] | None:
    """The code and text for an error that a caller can do something about; None for a bug of ours."""
    cause = error.__cause__ if isinstance(error, CgroupError) else None
    if isinstance(cause, OSError) and cause.errno in USED_UP:
        return StatusCode.RESOURCE_EXHAUSTED, f"the guest has no more of it: {error}"
    if isinstance(error, OSError) and error.errno in SCARCE:
        where = f": {error.filename}" if error.filename else ""
        return StatusCode.RESOURCE_EXHAUSTED, f"the guest has no more of it: {os.strerror(error.errno)}{where}"
    code = CODES.get(type(error))
    if code is None:
        return None
    if isinstance(error, LaunchError):
        return code, f"Could not run process: {error}"
    return code, str(error)

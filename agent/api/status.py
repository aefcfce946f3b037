"""Errors of the model → gRPC status codes.  Hosts compare some of the texts, so those are passed on as they are."""

from __future__ import annotations

import errno
import os

import grpc

from agent import errors
from agent.libcontainer.cgroups import CgroupError
from agent.libcontainer.errors import LaunchError
from agent.libcontainer.fields import SpecError

CODES: dict[type[Exception], grpc.StatusCode] = {
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.WrongState: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Invalid: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.TooLate: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Failed: grpc.StatusCode.INTERNAL,
    # Kata 1.x has no status for these: whatever its handlers return as a plain error is UNKNOWN.
    errors.Refused: grpc.StatusCode.UNKNOWN,
    errors.EndOfStream: grpc.StatusCode.UNKNOWN,
    errors.BrokenStream: grpc.StatusCode.UNKNOWN,
    errors.Ended: grpc.StatusCode.UNKNOWN,
    SpecError: grpc.StatusCode.INVALID_ARGUMENT,
    LaunchError: grpc.StatusCode.INTERNAL,
    CgroupError: grpc.StatusCode.INTERNAL,
}


#: The guest has no more of something; no bug, and no fault of the request.  A cgroup's ENOSPC and EAGAIN mean others.
USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
SCARCE = (*USED_UP, errno.ENOSPC, errno.EAGAIN)


def status_of(error: Exception) -> tuple[grpc.StatusCode, str] | None:
    """The code and text for an error that a caller can do something about; None for a bug of ours."""
    cause = error.__cause__ if isinstance(error, CgroupError) else None
    if isinstance(cause, OSError) and cause.errno in USED_UP:
        return grpc.StatusCode.RESOURCE_EXHAUSTED, f"the guest has no more of it: {error}"
    if isinstance(error, OSError) and error.errno in SCARCE:
        where = f": {error.filename}" if error.filename else ""
        return grpc.StatusCode.RESOURCE_EXHAUSTED, f"the guest has no more of it: {os.strerror(error.errno)}{where}"
    code = CODES.get(type(error))
    if code is None:
        return None
    if isinstance(error, LaunchError):
        return code, f"Could not run process: {error}"
    return code, str(error)

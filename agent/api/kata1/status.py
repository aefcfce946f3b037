"""The status and message that Kata 1.x hosts get for each kind of error.

The reference gives most errors no status, which makes them UNKNOWN; hosts distinguish them by their texts.
"""

from __future__ import annotations

from caisson.agent.api.status import status_from
from caisson.agent.base import errors
from caisson.agent.libcontainer.cgroups import CgroupError
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.rpc.codes import StatusCode as Code

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.api.status import Status, Table

TABLE: Table = {
    errors.NotFound: (Code.NOT_FOUND, "{error}"),
    errors.ContainerNotFound: (Code.NOT_FOUND, "Container {container_id} not found"),
    errors.ProcessNotFound: (Code.NOT_FOUND, "Process {exec_id} not found (container {container_id})"),
    errors.LinkNotFound: (
        Code.INTERNAL,
        "updateInterface: rpc error: code = NotFound desc = "
        'Could not find the link corresponding to HwAddr "{address}"',
    ),
    errors.DeviceNotFound: (Code.INTERNAL, "Could not find link from device {device}: Link not found"),
    errors.AlreadyExists: (Code.ALREADY_EXISTS, "{error}"),
    errors.SandboxExists: (Code.ALREADY_EXISTS, "Sandbox already started, impossible to start again"),
    errors.ContainerExists: (Code.ALREADY_EXISTS, "Container {container_id} already exists, impossible to create"),
    errors.ProcessExists: (Code.ALREADY_EXISTS, "Process {exec_id} already exists (container {container_id})"),
    errors.FailedPrecondition: (Code.FAILED_PRECONDITION, "{error}"),
    errors.SandboxNotRunning: (Code.FAILED_PRECONDITION, "Sandbox not started"),
    errors.NotCreated: (
        Code.FAILED_PRECONDITION,
        "Container {container_id} status {status}, should be created",
    ),
    errors.CannotExec: (Code.FAILED_PRECONDITION, "Cannot exec in {status} container {container_id}"),
    errors.CannotPause: (Code.UNKNOWN, "container not running or created: {status}"),
    errors.NotPaused: (Code.UNKNOWN, "container not paused"),
    errors.NotRunning: (Code.UNKNOWN, "container not running"),
    errors.NoTerminal: (Code.FAILED_PRECONDITION, "Terminal is not set, impossible to resize it"),
    errors.InvalidArgument: (Code.INVALID_ARGUMENT, "{error}"),
    errors.MissingArgument: (Code.UNKNOWN, "{error}"),
    errors.PathOutside: (Code.UNKNOWN, "Only is possible to copy files into the {root} directory"),
    errors.UnknownStorageDriver: (Code.INVALID_ARGUMENT, 'Unknown storage driver "{driver}"'),
    errors.ModuleNotLoaded: (Code.UNKNOWN, "could not load module: {module}: {why}"),
    errors.Unsupported: (Code.UNIMPLEMENTED, "{error}"),
    errors.Timeout: (Code.DEADLINE_EXCEEDED, "{error}"),
    errors.RemovalTimeout: (Code.DEADLINE_EXCEEDED, "Timeout reached after {seconds:g}s"),
    errors.DeviceTimeout: (Code.DEADLINE_EXCEEDED, "Timeout reached after {seconds:g}s waiting for device {device}"),
    errors.SystemCallFailed: (Code.INTERNAL, "{error}"),
    errors.EndOfStream: (Code.UNKNOWN, "EOF"),
    errors.BrokenStream: (Code.UNKNOWN, "write |1: broken pipe"),
    errors.ProcessExited: (Code.UNKNOWN, "no such process"),
    SpecError: (Code.INVALID_ARGUMENT, "{error}"),
    LaunchError: (Code.INTERNAL, "Could not run process: {error}"),
    CgroupError: (Code.INTERNAL, "{error}"),
}


def status_of(error: Exception) -> Status | None:
    """Return the code and text for an error that the caller can act on; None for a bug."""
    return status_from(TABLE, error)

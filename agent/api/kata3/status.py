"""The status and message that Kata 3.x hosts get for each kind of error.

The reference uses INTERNAL for nearly everything, where codes here are more specific.  Hosts distinguish only:
UNIMPLEMENTED, and the texts "Link not found" and "ESRCH: No such process".
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
    errors.ModelError: (Code.INTERNAL, "{error}"),
    errors.AlreadyExists: (Code.ALREADY_EXISTS, "{error}"),
    errors.FailedPrecondition: (Code.FAILED_PRECONDITION, "{error}"),
    errors.BrokenStream: (Code.INTERNAL, "broken pipe"),
    errors.NotFound: (Code.NOT_FOUND, "{error}"),
    errors.ContainerNotFound: (Code.INVALID_ARGUMENT, "invalid container id"),
    errors.LinkNotFound: (Code.INTERNAL, "Link not found ({address})"),
    errors.DeviceNotFound: (Code.INTERNAL, "Link not found ({device})"),
    errors.InvalidArgument: (Code.INVALID_ARGUMENT, "{error}"),
    errors.PathOutside: (Code.INTERNAL, "{error}"),
    errors.UnknownStorageDriver: (Code.INTERNAL, "Failed to find the storage handler {driver}"),
    errors.NoTerminal: (Code.UNAVAILABLE, "no tty"),
    errors.Unsupported: (Code.UNIMPLEMENTED, "{error}"),
    errors.Timeout: (Code.DEADLINE_EXCEEDED, "{error}"),
    errors.ProcessExited: (Code.INTERNAL, "ESRCH: No such process"),
    SpecError: (Code.INVALID_ARGUMENT, "{error}"),
    LaunchError: (Code.INTERNAL, "Could not run process: {error}"),
    CgroupError: (Code.INTERNAL, "{error}"),
}


def status_of(error: Exception) -> Status | None:
    """Return the code and text for an error that the caller can act on; None for a bug."""
    return status_from(TABLE, error)

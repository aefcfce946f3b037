"""Map errors to status codes and messages, by an adapter's table of kinds.  Hosts compare some messages word by
word.
"""

from __future__ import annotations

import errno
import os

from caisson.agent.base.errors import ModelError
from caisson.agent.libcontainer.cgroups import CgroupError
from caisson.agent.rpc.codes import StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    #: Kinds of errors, each with its code and a message with its fields; ``{error}`` is the error's own message.
    Table = Mapping[type[Exception], tuple[StatusCode, str]]
    Status = tuple[StatusCode, str]

#: The guest has run out of a resource: neither a bug nor the request's fault.  A cgroup's ENOSPC and EAGAIN mean
#: something else.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
RESOURCE_ERRORS = (*EXHAUSTED, errno.ENOSPC, errno.EAGAIN)


class StatusError(Exception):
    """An error of the adapter itself, for a request that does not reach the model."""

    def __init__(self, code: StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


def status_from(table: Table, error: Exception) -> Status | None:
    """Return the code and text for an error that the caller can act on; None for a bug.

    The entry of the most specific class applies.
    """
    if isinstance(error, StatusError):
        return error.code, str(error)
    cause = error.__cause__ if isinstance(error, CgroupError) else None
    if isinstance(cause, OSError) and cause.errno in EXHAUSTED:
        return StatusCode.RESOURCE_EXHAUSTED, f"the guest has no more of it: {error}"
    if isinstance(error, OSError) and error.errno in RESOURCE_ERRORS:
        where = f": {error.filename}" if error.filename else ""
        return StatusCode.RESOURCE_EXHAUSTED, f"the guest has no more of it: {os.strerror(error.errno)}{where}"
    for kind in type(error).__mro__:
        if kind in table:
            code, sentence = table[kind]
            fields = error.fields if isinstance(error, ModelError) else {}
            return code, sentence.format(error=error, **fields)
    return None

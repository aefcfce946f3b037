"""Errors → status codes and sentences, by an adapter's table of kinds.  Hosts compare some sentences, word by word."""

from __future__ import annotations

import errno
import os

from caisson.agent.base.errors import ModelError
from caisson.agent.libcontainer.cgroups import CgroupError
from caisson.agent.rpc.codes import StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    #: Kinds of errors, each with its code and a sentence about its fields; ``{error}`` stands for the error's own.
    Table = Mapping[type[Exception], tuple[StatusCode, str]]
    Status = tuple[StatusCode, str]

#: The guest has no more of something; no bug, and no fault of the request.  A cgroup's ENOSPC and EAGAIN mean others.
USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
SCARCE = (*USED_UP, errno.ENOSPC, errno.EAGAIN)


class StatusError(Exception):
    """An adapter's own refusal, of a request that does not get as far as the model."""

    def __init__(self, code: StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


def status_from(table: Table, error: Exception) -> Status | None:
    """Return the code and text for an error that a caller can do something about; None for a bug of ours.

    The entry of the nearest class counts: one of a kind is for all that have none of their own.
    """
    if isinstance(error, StatusError):
        return error.code, str(error)
    cause = error.__cause__ if isinstance(error, CgroupError) else None
    if isinstance(cause, OSError) and cause.errno in USED_UP:
        return StatusCode.RESOURCE_EXHAUSTED, f"the guest has no more of it: {error}"
    if isinstance(error, OSError) and error.errno in SCARCE:
        where = f": {error.filename}" if error.filename else ""
        return StatusCode.RESOURCE_EXHAUSTED, f"the guest has no more of it: {os.strerror(error.errno)}{where}"
    for kind in type(error).__mro__:
        if kind in table:
            code, sentence = table[kind]
            fields = error.fields if isinstance(error, ModelError) else {}
            return code, sentence.format(error=error, **fields)
    return None

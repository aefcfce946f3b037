"""Errors of the model: a kind, and the objects concerned.

Each generation of the API has its own status codes and messages, which hosts compare; they are in its adapter's table
(api/*/status.py), by kind.  ``str()`` of an error is a message for logs, and for adapters without one.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar


def reason(error: OSError) -> str:
    """Describe why a system call failed, for use within a sentence."""
    return os.strerror(error.errno or 0).lower()


class ModelError(Exception):
    """A request that cannot be carried out."""

    #: The message, if no text is given.
    sentence: ClassVar[str] = "the request cannot be carried out"

    def __init__(self, text: str = "", /, **fields: object) -> None:
        """``fields`` name the objects: a container's id, a path, a number."""
        self.fields = fields
        super().__init__(text or self.sentence.format(**fields))


class NotFound(ModelError):
    """No object of this name."""


class ContainerNotFound(NotFound):
    """No container of this id: ``container_id``."""

    sentence = "container {container_id}: not found"


class ProcessNotFound(NotFound):
    """No process of this id in a container: ``container_id``, ``exec_id``."""

    sentence = "process {exec_id}: not found in container {container_id}"


class LinkNotFound(NotFound):
    """No network interface with this hardware address: ``address``."""

    sentence = "network interface {address}: not found"


class DeviceNotFound(NotFound):
    """No network interface of this name: ``device``."""

    sentence = "network interface {device}: not found"


class AlreadyExists(ModelError):
    """The name is taken."""


class SandboxExists(AlreadyExists):
    """The sandbox is already running."""

    sentence = "the sandbox is already running; destroy it first"


class ContainerExists(AlreadyExists):
    """There is a container of this id: ``container_id``."""

    sentence = "container {container_id}: already exists; remove it first, or choose another id"


class ProcessExists(AlreadyExists):
    """There is a process of this id in the container: ``container_id``, ``exec_id``."""

    sentence = "process {exec_id}: already exists in container {container_id}; choose another id"


class FailedPrecondition(ModelError):
    """Not possible in the object's current state."""


class SandboxNotRunning(FailedPrecondition):
    """There is no sandbox, or it is being destroyed."""

    sentence = "the sandbox is not running; create it first"


class NotCreated(FailedPrecondition):
    """Only a container that was created can be started: ``container_id``, ``status``."""

    sentence = "container {container_id}: cannot be started: it is {status}"


class NotStopped(FailedPrecondition):
    """Only a container that has exited can be created again: ``container_id``, ``status``."""

    sentence = "container {container_id}: cannot be created again: it is {status}"


class CannotExec(FailedPrecondition):
    """No process can be started in the container now: ``container_id``, ``status``."""

    sentence = "container {container_id}: cannot run another process: it is {status}"


class CannotPause(FailedPrecondition):
    """Only a container that was created, or runs, can be paused: ``container_id``, ``status``."""

    sentence = "container {container_id}: cannot be paused: it is {status}"


class NotPaused(FailedPrecondition):
    """Only a paused container can be resumed: ``container_id``."""

    sentence = "container {container_id}: is not paused"


class NotRunning(FailedPrecondition):
    """The container has stopped: ``container_id``."""

    sentence = "container {container_id}: has stopped"


class NoTerminal(FailedPrecondition):
    """The process has no terminal: ``exec_id``."""

    sentence = "process {exec_id}: has no terminal"


class InvalidArgument(ModelError):
    """A value that is invalid in any state."""


class MissingArgument(InvalidArgument):
    """A required value is missing."""


class PathOutside(InvalidArgument):
    """A path outside the directory it must be in: ``path``, ``root``."""

    sentence = "{path}: is not below {root}"


class OutputNotKept(InvalidArgument):
    """A container's output is not being kept: ``container_id``."""

    sentence = "container {container_id}: its output is not kept"


class UnknownStorageDriver(InvalidArgument):
    """A storage of a kind that this agent does not support: ``driver``."""

    sentence = "storage driver {driver}: is not known"


class ModuleNotLoaded(ModelError):
    """A module of the kernel could not be loaded: ``module``, ``why``."""

    sentence = "kernel module {module}: {why}"


class Unsupported(ModelError):
    """Not supported by this agent, or this guest."""


class Timeout(ModelError):
    """Not done within the given time."""


class RemovalTimeout(Timeout):
    """A container was not removed in time; removal continues: ``container_id``, ``seconds``."""

    sentence = "container {container_id}: not removed within {seconds:g} s; removal continues"


class ReadTimeout(Timeout):
    """A container's data could not be read in time: ``container_id``, ``seconds``."""

    sentence = "container {container_id}: could not be inspected within {seconds:g} s; kill it if this persists"


class DeviceTimeout(Timeout):
    """A device did not appear in time: ``device``, ``seconds``."""

    sentence = "device {device}: did not appear within {seconds:g} s"


class SystemCallFailed(ModelError):
    """The kernel returned an error."""


class EndOfStream(ModelError):
    """All output has been delivered."""

    sentence = "end of the output"


class BrokenStream(ModelError):
    """There is no reader any more."""

    sentence = "nothing reads standard input any more"


class ProcessExited(ModelError):
    """The process has exited, and cannot be signalled."""

    sentence = "the process has ended"

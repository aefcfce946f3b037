"""Errors of the shim, with the status that containerd's clients expect.

Source: containerd, pkg/errdefs (gRPC's codes by kind).
"""

from __future__ import annotations

from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.responses import RpcError


class ShimError(Exception):
    """A request that cannot be fulfilled."""

    def __init__(self, code: StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


def not_found(what: str) -> ShimError:
    """Return the error for an unknown container or process."""
    return ShimError(StatusCode.NOT_FOUND, f"{what}: not found")


def finished() -> ShimError:
    """Return the error for a signal to an exited process: clients match this text."""
    return ShimError(StatusCode.NOT_FOUND, "process already finished")


def wrong_state(text: str) -> ShimError:
    """Return the error for a request that a process's state does not allow."""
    return ShimError(StatusCode.FAILED_PRECONDITION, text)


def status_of(error: Exception) -> tuple[StatusCode, str] | None:
    """Return the status and text of an error; None for a bug."""
    from caisson.agent.libcontainer.config.reader import SpecError
    from caisson.agent.pods.machines import MachineError
    from caisson.agent.pods.network import NetworkError
    from caisson.agent.shim.cgroup import CgroupError
    from caisson.agent.shim.mounts import MountError
    from caisson.agent.shim.spec import UnsupportedSpec
    from caisson.proto.from_json import FieldError

    if isinstance(error, ShimError):
        return error.code, str(error)
    if isinstance(error, RpcError):
        return error.code, error.text
    if isinstance(error, (FieldError, SpecError, UnsupportedSpec)):
        return StatusCode.INVALID_ARGUMENT, str(error)
    if isinstance(error, (CgroupError, MachineError, MountError, NetworkError, OSError)):
        return StatusCode.UNKNOWN, str(error)
    return None

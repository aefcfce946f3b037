"""Adapt a container's configuration to the guest: its own namespaces, limits and hooks replace the host's."""

from __future__ import annotations

from caisson.agent.base.errors import FailedPrecondition, InvalidArgument
from caisson.agent.libcontainer.config.process import Rlimit
from caisson.agent.libcontainer.config.spec import Hooks, Namespace
from caisson.agent.model.namespaces import SHARED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.guest.hooks import GuestHooks
    from caisson.agent.libcontainer.config.spec import Spec


def adapt_to_guest(container_id: str, spec: Spec, open_files: tuple[int, int], hooks: GuestHooks | None) -> Spec:
    """Return the spec with this guest's namespaces, limits and hooks.

    IPC and UTS namespaces are the sandbox's, the pid namespace is its own or the sandbox's, the network is the guest's
    unless a new one is requested; a host's paths mean nothing in a guest.  ``open_files`` is RLIMIT_NOFILE, soft and
    hard, if the spec has none.  Raises FailedPrecondition.
    """
    kinds = {namespace.type: namespace.path for namespace in spec.linux.namespaces}
    if "pid" in kinds:
        raise FailedPrecondition(
            f"Unexpected PID namespace received for container {container_id}, should have been cleared out"
        )
    if kinds.get("network"):
        del kinds["network"]
    kinds |= {"pid": "", "mount": "", **dict.fromkeys(SHARED, "")}
    namespaces = tuple(Namespace(kind) for kind in kinds)
    process = spec.process
    if process is not None and all(limit.type != "RLIMIT_NOFILE" for limit in process.rlimits):
        soft, hard = open_files
        process = process.but(rlimits=(*process.rlimits, Rlimit("RLIMIT_NOFILE", soft=soft, hard=hard)))
    if process is not None and process.oom_score_adj is None:
        process = process.but(oom_score_adj=0)  # not the agent's own
    if hooks is not None or spec.hooks != Hooks():
        spec = (hooks or guest_hooks("")).add_to(spec)
    from caisson.agent.guest.resources import fit

    resources = spec.linux.resources and fit(spec.linux.resources)
    return spec.but(process=process, linux=spec.linux.but(namespaces=namespaces, resources=resources))


def may_make_networks(spec: Spec) -> bool:
    """Return whether its processes may have the capability to create links and bridges."""
    capabilities = None if spec.process is None else spec.process.capabilities
    return capabilities is not None and "CAP_NET_ADMIN" in capabilities.bounding


def guest_hooks(path: str) -> GuestHooks:
    """Read the guest's own hooks; most guests have none.  Raises InvalidArgument."""
    from caisson.agent.guest.hooks import GuestHooks

    if path and not path.startswith("/"):
        raise InvalidArgument(f"guest_hook_path: {path!r} must be an absolute path")
    try:
        return GuestHooks(path)
    except OSError as error:
        raise InvalidArgument(f"guest_hook_path: {error.filename}: {error.strerror}") from error

"""Which kernel parameters a container may set: only those that belong to one of its namespaces."""

from __future__ import annotations

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.plan import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

IPC = {
    f"kernel/{name}"
    for name in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")
}  # fmt: skip


def path_of(key: str) -> str:
    """Return `net.ipv4.ip_forward` or `net/ipv4/ip_forward` as a path below /proc/sys.

    As in sysctl(8): the first separator decides between the two forms, and the other character is literal within a name
    (`net.ipv4.conf.eth0/1.rp_filter` is about eth0.1).  Raises SpecError.
    """
    dot, slash = key.find("."), key.find("/")
    path = key.translate({ord("."): "/", ord("/"): "."}) if dot >= 0 and (slash < 0 or dot < slash) else key
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise SpecError(f"linux.sysctl[{key}]", "is not a kernel parameter")
    return path


def needed_namespace(path: str) -> str | None:
    """Return the namespace type that a parameter belongs to; None for machine-wide ones."""
    if path in IPC or path.startswith("fs/mqueue/"):
        return "ipc"
    if path == "kernel/domainname":
        return "uts"
    if path.startswith("net/"):
        return "network"
    if path.startswith("user/"):
        return "user"
    return None


def steps(kind: int, values: Mapping[str, str], types: set[str]) -> Iterable[bytes]:
    """Encode the steps for allowed parameters.  Raises SpecError for others."""
    for key, value in values.items():
        where = f"linux.sysctl[{key}]"
        path = path_of(key)
        if path == "kernel/hostname":
            raise SpecError(where, "is set by hostname")
        namespace = needed_namespace(path)
        if namespace is None:
            raise SpecError(where, "is not a parameter of a namespace: it would change the whole machine")
        if namespace not in types:
            raise SpecError(where, f"needs a {namespace} namespace")
        if "\n" in value:
            raise SpecError(where, "must not contain a newline")
        yield wire.attribute(kind, b"\0".join((wire.encode(path), wire.encode(value), b"")), where)

"""A container's cgroup filesystem: one line of the configuration, and what is mounted for it.

The type `cgroup` stands for whatever cgroups the guest has.  Version 2 is one mount.  Version 1 is a small tmpfs with a
directory for every hierarchy, and links for controllers that share one (config-linux.md, "Control groups").  Each of
these mounts has the options of the line: what is read-only is so everywhere (CVE-2023-25809).
"""

from __future__ import annotations

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Mount
from caisson.agent.libcontainer.plan import mount_options as mountopts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

TYPES = ("cgroup", "cgroup2")


def is_one(mount: Mount) -> bool:
    """Whether a mount is of cgroups, and not of a directory that is bound."""
    return mount.type in TYPES and not mountopts.parse(mount.options, type_=mount.type, where="mounts").bind


def expand(
    mount: Mount, where: str, cgroups: Mapping[str, str], *, namespace: bool
) -> tuple[list[Mount], list[tuple[str, str]]]:
    """The mounts for a mount of cgroups, and links as (target, path) to be made in them.

    `cgroups` are the container's directories by controllers, "" for version 2.  In a cgroup namespace of its own the
    filesystem itself shows the container's part; without one that directory is bound.  Raises SpecError.
    """
    options = mountopts.parse(mount.options, type_=mount.type, where=f"{where}.options")
    if options.data:
        raise SpecError(f"{where}.options", f"{options.data[0]!r} is not an option of a container's cgroups")
    if not namespace and not cgroups:
        raise SpecError(where, "a cgroup mount needs a cgroup namespace or a cgroup of the container's own")
    if not cgroups or "" in cgroups:
        if namespace:
            return [mount.but(type="cgroup2", source="cgroup2")], []
        return [_bound(mount, mount.destination, cgroups[""])], []
    if mount.type == "cgroup2":
        raise SpecError(f"{where}.type", "the cgroups of this guest are of version 1")
    target = mount.destination.rstrip("/")
    propagation = [option for option in mount.options if option in mountopts.PROPAGATION]
    rest = tuple(option for option in mount.options if option not in propagation)
    mounts = [Mount(target, "tmpfs", "tmpfs", (*rest, "mode=755", "size=64k"))]
    links = []
    for name, path in cgroups.items():
        one = mount.but(destination=f"{target}/{name}", options=rest)
        controllers = name.split(",")
        if namespace:
            mounts.append(one.but(type="cgroup", source="cgroup", options=(*rest, *controllers)))
        else:
            mounts.append(_bound(one, one.destination, path))
        if len(controllers) > 1:
            links += [(name, f"{target}/{controller}") for controller in controllers]
    return mounts, links


def expand_all(
    mounts: Iterable[Mount], cgroups: Mapping[str, str], *, namespace: bool
) -> tuple[list[tuple[str, Mount]], list[tuple[str, str]]]:
    """All mounts of a configuration, each with the field that it comes from, and the links."""
    found: list[tuple[str, Mount]] = []
    links: list[tuple[str, str]] = []
    for index, mount in enumerate(mounts):
        where = f"mounts[{index}]"
        if is_one(mount):
            some, more = expand(mount, where, cgroups, namespace=namespace)
            found += [(where, one) for one in some]
            links += more
        else:
            found.append((where, mount))
    return found, links


def _bound(mount: Mount, destination: str, path: str) -> Mount:
    return mount.but(destination=destination, type="bind", source=path, options=("bind", *mount.options))

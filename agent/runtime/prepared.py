"""exec.plan: what nsexec is told of an `exec` without options, kept in the state directory.

The front (agent/nsexec/front) does the next such exec by it, without an interpreter, as long as the bundle's
config.json is the one that it was made from.
"""

from __future__ import annotations

import os
from struct import pack

from caisson.agent.libcontainer.plan import plan, users, wire
from caisson.agent.libcontainer.state import write_whole
from caisson.agent.libcontainer.state_directory import ContainerError, ContainerLock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.libcontainer.config.spec import Process
    from caisson.agent.libcontainer.container import Container

FILE = "exec.plan"
MAGIC = b"CAISEXE1"
NOBODY_ELSE = 0xFFFF_FFFF


class Identity:
    """Which config.json it is: that of a bundle now, compared with the one of before."""

    def __init__(self, bundle: str) -> None:
        """Raises OSError."""
        now = os.stat(f"{bundle}/config.json")  # noqa: PTH116 - no pathlib at start
        self.numbers = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.numbers == self.numbers

    __hash__ = None  # type: ignore[assignment]


def keep(container: Container, process: Process, config: Identity) -> None:
    """Write exec.plan for a process of the bundle's, unless another command has the container at this moment."""
    spec = container.spec
    seccomp = spec.linux.seccomp
    if process.user.username or process.terminal or (seccomp is not None and seccomp.listener_path):
        return
    try:
        with ContainerLock(container.directory, wait=False):
            write_whole(f"{container.directory}/{FILE}", encode(container, process, config))
    except (ContainerError, OSError):
        pass


def encode(container: Container, process: Process, config: Identity) -> bytes:
    """The file: a header, the messages up to the strings, the environment (read by agent/nsexec/front/prepared.c)."""
    has_home = any(variable.startswith("HOME=") and variable != "HOME=" for variable in process.env)
    if not has_home:
        process = process.but(env=tuple(variable for variable in process.env if variable != "HOME="))
    process = process.but(args=())
    messages = plan.exec_messages(process, container.spec, container.state.joined, container.filter())
    environment = plan.environment(process)
    head = messages[: -len(wire.strings(environment))]
    kept = wire.texts(*(environment if has_home else environment[:-1]))
    owner, group = users.mapped_root(container.spec.linux) or (NOBODY_ELSE, NOBODY_ELSE)
    count = len(environment) - (not has_home)
    numbers = (owner, group, process.user.uid, has_home, count, len(kept), len(head))
    return MAGIC + pack("=5Q7I", *config.numbers, *numbers) + head + kept

"""The arguments and the result of starting a process."""

from __future__ import annotations

import os
import stat

from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.plan import users
from caisson.proto.record import NOTHING, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from caisson.agent.libcontainer.config.spec import Spec
    from caisson.agent.libcontainer.process.children import Child


class Stdio(Record):
    """File descriptors for the child's 0, 1 and 2; the caller closes them afterwards."""

    stdin: int
    stdout: int
    stderr: int


class Launched(Record):
    """A started process.

    `console` is the master of its terminal, if it has one; `pidfd` is its own.  The caller owns both.  `stages` are the
    children before it, which exit by themselves.
    """

    child: Child
    console: int | None
    pidfd: int
    stages: tuple[Child, ...] = ()


class Launch(Record):
    """How to start a process, apart from its messages.

    `stdio` is None if and only if it has a terminal.  `cgroup_fds` are descriptors of its cgroup by nsexec's names
    for them.  It keeps `preserved` descriptors from 3 on.  `announced` is called with its pid while it is set
    up. An init is put into its root by pivot_root(2), or for `pivot` False by chroot(2), and has a session keyring of
    its own, or for `keyring` False the caller's.  `on_host`: as for plan.init_messages and plan.exec_messages.
    """

    container_id: str
    stdio: Stdio | None
    cgroup_fds: Mapping[str, int] = NOTHING
    preserved: int = 0
    announced: Callable[[int], object] | None = None
    pivot: bool = True
    keyring: bool = True
    on_host: bool = False


def check_stdio(terminal: bool, stdio: Stdio | None) -> None:
    """Raise LaunchError for both descriptors and a terminal, or for neither."""
    if terminal != (stdio is None):
        raise LaunchError("stdio is given iff there is no terminal", step="stdio")


def own_pipes(stdio: Stdio | None, spec: Spec) -> None:
    """Give pipes to the root of the container's user namespace, which otherwise could not open /dev/stdout."""
    owner = users.mapped_root(spec.linux)
    if owner is None or stdio is None:
        return
    for fd in (stdio.stdin, stdio.stdout, stdio.stderr):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, *owner)

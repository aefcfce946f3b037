"""Files for the front (agent/nsexec/front) in a state directory, so that it can run plain commands without an
interpreter.

`front.state` is what `state` prints and other commands ask of a container, as long as state.json is the one that it was
made from; `exec.plan` is what nsexec is told of an `exec` without options, as long as the bundle's config.json is the
same.  Both are written here and read in C; whoever changes them changes the magic numbers on both sides.
"""

from __future__ import annotations

import os
from struct import pack

from caisson.agent.base.json import dumps
from caisson.agent.libcontainer.config.scheduling import is_lost_by_clone
from caisson.agent.libcontainer.plan import plan, users, wire
from caisson.agent.libcontainer.state import FILE as STATE
from caisson.agent.libcontainer.state import STOPPED, write_whole
from caisson.agent.libcontainer.state_directory import ContainerError, ContainerLock
from caisson.agent.runtime.inspect import document

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.libcontainer.config.process import Process
    from caisson.agent.libcontainer.container import Container

STATE_MAGIC, PLAN_MAGIC = b"CAISFRO1", b"CAISEXE1"
OWN_PIDS, START_HOOKS, POSTSTOP_HOOKS = 1, 2, 4
NOBODY_ELSE = 0xFFFF_FFFF

Identity = tuple[int, int, int, int, int]


def identity(path: str) -> Identity:
    """Return the identity of a file, including its state.  Raises OSError."""
    now = os.stat(path)  # noqa: PTH116 - no pathlib at start
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def write_front_state(container: Container) -> None:
    """Write front.state after state.json; without it the interpreter does everything."""
    if container.state.systemd or container.spec.linux.intel_rdt is not None:  # handled only in Python
        return
    try:
        write_whole(f"{container.directory}/front.state", encode_state(container))
    except OSError:
        pass


def encode_state(container: Container) -> bytes:
    """Encode the file: a header, what `state` prints around pid and status, the cgroups, the bundle."""
    state, hooks = container.state, container.spec.hooks
    moving = '"pid": 0,\n  "status": "stopped"'  # no string of JSON holds a line's end as it is
    before, _, after = dumps(document(state, STOPPED), 2).partition(moving)
    flags = container.has_own_pids * OWN_PIDS
    flags |= bool(hooks.start_container or hooks.poststart) * START_HOOKS
    flags |= bool(hooks.poststop) * POSTSTOP_HOOKS
    kinds: dict[str, str] = {}
    for controller, path in state.cgroup_paths.items():
        kind = {"freezer": "f", "": "u"}.get(controller, "o")
        kinds[path] = kind if kind != "o" else kinds.get(path, kind)
    cgroups = wire.texts(*(f"{kind}{path}" for path, kind in sorted(kinds.items(), key=lambda item: item[1] == "f")))
    parts = [wire.encode(before), wire.encode(after), cgroups, wire.texts(state.bundle)]
    numbers = (state.init_process_start, state.init_process_pid, flags, *map(len, parts))
    return STATE_MAGIC + pack("=5Q Q6I", *identity(f"{container.directory}/{STATE}"), *numbers) + b"".join(parts)


def write_front_exec(container: Container, process: Process, config: Identity) -> None:
    """Write exec.plan for a process of the bundle, unless another command holds the container's lock."""
    seccomp = container.spec.linux.seccomp
    if process.user.username or process.terminal or (seccomp is not None and seccomp.listener_path):
        return
    own = container.spec.process
    if is_lost_by_clone(process.scheduler or (own.scheduler if own is not None else None)):  # the runtime sets it
        return
    try:
        with ContainerLock(container.directory, wait=False):
            write_whole(f"{container.directory}/exec.plan", encode_exec(container, process, config))
    except (ContainerError, OSError):
        pass


def encode_exec(container: Container, process: Process, config: Identity) -> bytes:
    """Encode the file: a header, the messages up to the strings, the environment; without HOME that is added in C."""
    has_home = users.has_home(process)
    if not has_home:
        process = process.but(env=tuple(variable for variable in process.env if not variable.startswith("HOME=")))
    process = process.but(args=())
    messages = plan.exec_messages(process, container.spec, container.state.joined, container.filter(), on_host=True)
    environment = plan.environment(process)
    head = messages[: -len(wire.strings(environment))]
    kept = wire.texts(*(environment if has_home else environment[:-1]))
    owner, group = users.mapped_root(container.spec.linux) or (NOBODY_ELSE, NOBODY_ELSE)
    count = len(environment) - (not has_home)
    numbers = (owner, group, process.user.uid, has_home, count, len(kept), len(head))
    return PLAN_MAGIC + pack("=5Q7I", *config, *numbers) + head + kept

"""Commands of a container's lifecycle: create, start, run, kill, delete."""

from __future__ import annotations

import os
from errno import EPERM

from caisson.agent.libcontainer import faults
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.container import Container
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.state import STOPPED, State
from caisson.agent.libcontainer.state_directory import ContainerError, ContainerLock, DoesNotExist, remove_directory
from caisson.agent.libcontainer.waits import complete
from caisson.agent.runtime.errors import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.libcontainer.cgroups import Cgroup
    from caisson.agent.libcontainer.config.spec import Spec
    from caisson.agent.runtime.bundle import Bundle
    from caisson.agent.runtime.main import Call
    from caisson.agent.runtime.stdio import ProcessIO

DIRECTORY_MODE, ROOT_MODE = 0o711, 0o700
START_FAILED = "_CAISSON_START_FAILED"  # what the front received from a failed start (agent/nsexec/front/start.c)
RTMIN, RTMAX = 34, 64
#: signal(7), without the prefix; the same on all supported architectures.
SIGNALS = {
    name: number
    for number, names in enumerate(
        (
            "", "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT IOT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
            "ALRM", "TERM", "STKFLT", "CHLD CLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
            "VTALRM", "PROF", "WINCH", "IO POLL", "PWR", "SYS UNUSED",
        )
    )
    for name in names.split()
} | {"RTMIN": RTMIN, "RTMAX": RTMAX}  # fmt: skip


def create(call: Call) -> int:
    """Create a container whose program waits to be started."""
    from caisson.agent.runtime.stdio import ProcessIO

    bundle = _bundle(call)
    with ProcessIO(call, bundle.spec.process, detach=True) as io:
        _create(call, bundle, io)
    return 0


def start(call: Call) -> int:
    """Execute the program of a created container."""
    heard = os.environ.get(START_FAILED)
    if heard is not None:
        from caisson.agent.libcontainer.process import gate

        raise gate.failure_of(heard)
    container = call.container()
    with ContainerLock(container.directory):
        _start(container)
    return 0


def _start(container: Container, *, wait: bool = True) -> None:
    """Execute the program, and with `wait` wait until it is ready, if it reports that."""
    from caisson.agent.runtime.notify import NotifyListener

    listener = NotifyListener(container)
    try:
        complete(container.start())
        if wait:
            listener.wait_ready()
    finally:
        listener.close()


def run(call: Call) -> int:
    """Create a container, start it, and unless detached wait for its exit and delete it."""
    from caisson.agent.runtime.stdio import ProcessIO

    detach = call.options.flag("detach")
    bundle = _bundle(call)
    if not detach and not call.options.flag("no-subreaper") and _leaves_orphans(bundle.spec):
        from caisson.agent.base.syscalls import set_child_subreaper

        set_child_subreaper()
    with ProcessIO(call, bundle.spec.process, detach=detach) as io:
        container = _create(call, bundle, io)
        try:
            _start(container, wait=detach)
        except BaseException:
            complete(container.destroy())
            remove_directory(container.directory)
            raise
        if detach:
            return 0
        status = io.follow(container.state.init_process_pid)
    if not call.options.flag("keep"):
        with ContainerLock(container.directory):
            complete(container.delete(force=True))
    return status


def _leaves_orphans(spec: Spec) -> bool:
    """Return whether orphans may be left: those in a pid namespace of its own have the container's init as parent."""
    from caisson.agent.libcontainer.config.spec import Hooks

    return not spec.linux.has_new_pids or spec.hooks != Hooks()


def _bundle(call: Call) -> Bundle:
    from caisson.agent.runtime.bundle import Bundle
    from caisson.agent.runtime.stdio import listen_environment

    call.id  # noqa: B018 - it is checked first
    bundle = Bundle(call, call.options.text("bundle"))
    if listen_environment():
        bundle.add_environment(*listen_environment())
    return bundle


def _create(call: Call, bundle: Bundle, io: ProcessIO) -> Container:
    """Create the container; nothing of it is left on failure."""
    from caisson.agent.runtime import notify

    directory = f"{call.root}/{call.id}"
    rootfs = bundle.rootfs
    try:
        os.makedirs(call.root, ROOT_MODE, exist_ok=True)  # noqa: PTH103 - no pathlib at start
    except OSError as error:
        raise CommandError(f"mkdir {call.root}: {(error.strerror or '').lower()}") from None
    try:
        os.mkdir(directory, DIRECTORY_MODE)  # noqa: PTH102
    except FileExistsError:
        raise ContainerError("container with given ID already exists") from None
    faults.reach("create_directory")
    with ContainerLock(directory):
        cgroup: Cgroup | None = None
        container: Container | None = None
        try:
            os.chmod(directory, DIRECTORY_MODE)  # noqa: PTH101 - whatever the umask is
            notify.prepare(call, bundle, directory)
            cgroup = _make_cgroup(call, bundle)
            faults.reach("create_limited")
            container = _launch(call, bundle, io, rootfs, cgroup)
            return container
        except BaseException:
            _undo(call, directory, cgroup, container)
            raise


def _launch(call: Call, bundle: Bundle, io: ProcessIO, rootfs: str, cgroup: Cgroup | None) -> Container:
    from caisson.agent.libcontainer.config.resources import Resources
    from caisson.agent.libcontainer.process.launch import Launch

    def make(cgroup_fds: dict[str, int]) -> Container:
        launch = Launch(
            call.id,
            io.stdio,
            cgroup_fds,
            io.preserved,
            io.announced,
            pivot=not call.options.flag("no-pivot"),
            keyring=not call.options.flag("no-new-keyring"),
            on_host=True,
        )
        container, launched = complete(
            Container.create(
                call.runtime,
                call.id,
                bundle.spec,
                launch,
                document=bundle.document,
                bundle=bundle.path,
                rootfs=rootfs,
                cgroup=cgroup,
                rootless=os.geteuid() != 0,
                systemd=call.systemd,
            )
        )
        io.launched(launched)
        _limit_processes(bundle, cgroup)
        return container

    if cgroup is None:
        return make({})
    try:
        with cgroup.join_fds() as fds:
            return make(fds)
    except LaunchError as error:
        if error.step == "scheduler" and error.errno == EPERM and (bundle.spec.linux.resources or Resources()).cpu.cpus:
            raise LaunchError("process scheduler can't be used together with AllowedCPUs", step="scheduler") from error
        if cgroup.oom_kills():
            raise LaunchError("container init was OOM-killed (memory limit too low?)", step="oom") from error
        raise


def _limit_processes(bundle: Bundle, cgroup: Cgroup | None) -> None:
    """Set pids.limit, which may leave no room for nsexec's stages.  Raises CgroupError."""
    from caisson.agent.libcontainer.config.resources import Resources

    limit = (bundle.spec.linux.resources or Resources()).pids_limit
    if cgroup is not None and limit is not None:
        cgroup.apply(Resources(pids_limit=limit), devices=False)


def _undo(call: Call, directory: str, cgroup: Cgroup | None, container: Container | None) -> None:
    """Remove what a failed create has made."""
    try:
        if container is not None:
            complete(container.destroy())
        elif cgroup is not None:
            if cgroup.pids():
                complete(cgroup.kill())
            complete(cgroup.delete())
    except Exception as error:  # the first failure is the one to report
        call.warn(str(error))
    remove_directory(directory)


def _make_cgroup(call: Call, bundle: Bundle) -> Cgroup | None:
    from caisson.agent.libcontainer.cgroups.base import CgroupError
    from caisson.agent.libcontainer.config.resources import Resources

    hierarchy = call.hierarchy()
    directory = f"{call.root}/{call.id}"
    resources = bundle.spec.linux.resources or Resources()
    path = bundle.spec.linux.cgroups_path
    if hierarchy is None:
        return None
    if resources.unified and set(hierarchy.place("x")) != {""}:
        raise CommandError("invalid configuration: cannot use unified on cgroup v1")
    if call.systemd:
        from caisson.agent.libcontainer.cgroups.systemd import PREFIX, Systemd
        from caisson.agent.libcontainer.cgroups.systemd_properties import properties

        hierarchy = Systemd(hierarchy, properties(bundle.spec.annotations))
        path = path or f":{PREFIX}:{call.id}"
    else:
        _ignore_unit_properties(call, bundle)
    below_own = not path.startswith("/")
    try:
        Container.reserve(
            directory, call.id, hierarchy.place(path or call.id, below_own=below_own), systemd=call.systemd
        )
        faults.reach("create_reserved")
        cgroup = hierarchy.create(path or call.id, below_own=below_own)
        faults.reach("create_cgroup")
    except CgroupError as error:
        if call.is_rootless and not path:
            call.log("debug", str(error))
            return None
        why = f"unable to apply cgroup configuration: {error}"
        raise CommandError(f"unable to start container process: {why}") from error
    try:
        in_userns = any(namespace.type == "user" for namespace in bundle.spec.linux.namespaces)
        # The process limit is set once nsexec has created its own stages (_limit_processes).
        cgroup.apply(resources.but(pids_limit=None), devices=not in_userns and not call.is_rootless)
    except (CgroupError, SpecError):
        complete(cgroup.delete())
        raise
    return cgroup


def _ignore_unit_properties(call: Call, bundle: Bundle) -> None:
    """Log annotations that only matter to systemd."""
    for key in bundle.spec.annotations:
        if key.startswith("org.systemd.property."):
            call.log("debug", f"annotation {key}: ignored without --systemd-cgroup")


def kill(call: Call) -> int:
    """Signal a container's init process, or all of its processes."""
    text = (call.operands[1] if len(call.operands) > 1 else "") or "SIGTERM"
    container = call.container()
    number = signal_number(text)
    every = call.options.flag("all")
    try:
        complete(container.kill(number, every=every))
    except ProcessLookupError:
        raise ContainerError("container not running") from None
    except ContainerError:
        if not every:
            raise
    return 0


def signal_number(text: str) -> int:
    """Parse a signal number or name.  Raises CommandError."""
    digits = text.removeprefix("+")
    if digits.isascii() and digits.isdecimal() and int(digits) <= RTMAX:
        return int(digits)
    name = text.upper().removeprefix("SIG")
    found = SIGNALS.get(name)
    base, sign, number = name[:5], name[5:6], name[6:]
    if found is None and (base, sign) in (("RTMIN", "+"), ("RTMAX", "-")) and number.isdecimal():
        found = RTMIN + int(number) if sign == "+" else RTMAX - int(number)
    if found is None or not 0 < found <= RTMAX:
        raise CommandError(f'unknown signal "{text}"')
    return found


def delete(call: Call) -> int:
    """Delete a container, even a half-created one."""
    force = call.options.flag("force")
    directory = f"{call.root}/{call.id}"
    try:
        with ContainerLock(directory):
            container = _load(call, directory)
            if container is None:
                remove_directory(directory)
                if not force:
                    raise DoesNotExist
            elif container.state.init_process_pid < 0:  # a killed create
                complete(container.destroy())
                remove_directory(directory)
            else:
                if not force and container.status == STOPPED and not container.has_own_pids:
                    force = True  # its remains are in its cgroup
                complete(container.delete(force=force))
    except DoesNotExist:
        if not force:
            raise
    return 0


def _load(call: Call, directory: str) -> Container | None:
    """Load the container of a directory, also one without a pid; None if it has no state yet.

    Raises SpecError for an unreadable state: its processes are then unknown.
    """
    try:
        return Container(call.runtime, directory, State.load(directory))
    except FileNotFoundError:
        return None

"""Turn an OCI configuration into three messages for nsexec: bootstrap, plan and strings.

All policy is here: which mounts, devices and links a container gets, and what is rejected.  The plan's steps are in the
order of their numbers, which is the order of execution (nsexec.h); nsexec rejects any other.
"""

from __future__ import annotations

from struct import pack

from caisson.agent.base import syscalls
from caisson.agent.libcontainer.config.process import Capabilities, Process, Rlimit, User
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Linux
from caisson.agent.libcontainer.plan import sysctl, wire
from caisson.agent.libcontainer.plan.capabilities import capability_mask, rlimit_number
from caisson.agent.libcontainer.plan.mounts import FileSystem, absolute, is_id_mapped, readonly_paths, root_propagation
from caisson.agent.libcontainer.plan.wire import (
    CAPABILITIES,
    CONSOLE,
    CPUS,
    CREATE_HOOK,
    CWD,
    DOMAINNAME,
    FINAL_CPUS,
    GROUPS,
    HOOK_STATE,
    HOSTNAME,
    IO_PRIORITY,
    LABEL,
    MASK,
    NO_NEW_PRIVS,
    PERSONALITY,
    PIVOT,
    PLAN_VERSION,
    PROPAGATION,
    READONLY,
    RLIMIT,
    ROOT_READONLY,
    ROOTFS,
    RUNTIME_HOOKS,
    SCHEDULER,
    SECCOMP,
    START_HOOK,
    STRINGS,
    SYSCTL,
    UMASK,
    USER,
    VERSION,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from caisson.agent.libcontainer.config.spec import Hook, Hooks, Spec

DEFAULT_UMASK = 0o022
NO_LINUX = Linux()
GROUPS_AT_ONCE = 16000  # in one attribute, whose length has 16 bits
GROUPS_MAX = 65536  # of a process (setgroups(2))
NOBODY = 65534
#: The least memory limit beside which all messages fit (4 MiB at most): a process that still has the agent's
#: oom_score_adj is not killed at its limit, but waits for memory.
MESSAGES_MEMORY = 6 << 20
PAUSE = Process(
    args=("pause",),
    user=User(uid=NOBODY, gid=NOBODY),
    no_new_privileges=True,
    rlimits=tuple(
        Rlimit(f"RLIMIT_{name}", limit, limit)
        for name, limit in (("NPROC", 1), ("AS", 16 << 20), ("NOFILE", 16), ("FSIZE", 0), ("MSGQUEUE", 0), ("CORE", 0))
    ),
)


def init_messages(
    spec: Spec,
    *,
    rootfs: str,
    bundle: str,
    join: Mapping[str, str],
    cgroups: Mapping[str, str],
    procfs: str | None = None,
    hook_state: str = "{",
    filter: bytes = b"",
    net_requests: Iterable[tuple[str, bytes]] = (),
    map_programs: tuple[str, str] | None = None,
    setgroups: bool = True,
    pivot: bool = True,
    keyring: bool = True,
    on_host: bool = False,
) -> bytes:
    """Encode the messages for a container's init process.

    `join` maps OCI namespace types to paths that are entered instead of making a new one; `cgroups` are
    the container's directories by controllers ("" for v2), shown at its cgroup mount; `procfs` is a
    mount of procfs of the pid namespace that is joined, of which proc mounts become copies; `hook_state` is
    the beginning of the state that hooks get (hooks.py), `filter` flags and program of the system call filter
    (seccomp_bpf.py); `net_requests` are requests of rtnetlink about interfaces, made inside;
    `map_programs`, `setgroups` and `keyring` are as for wire.bootstrap; without `pivot` the root is moved over the old
    one; `on_host` allows a container in the runtime's own mount namespace or in one that is joined by its path, and
    shows the host's cgroups to one without a cgroup namespace.  Raises SpecError or EncodingError.
    """
    process = spec.process
    if process is None:
        raise SpecError("process", "is missing: there is nothing to run")
    joined = joined_paths(spec.linux, join)
    types = {namespace.type for namespace in spec.linux.namespaces} | set(joined)
    own_mounts, new_user = "mount" in types, "user" in types - set(joined)
    _check_namespaces(spec, types, joined, on_host=on_host)
    files = FileSystem(spec, bundle, cgroups, types, rootfs, on_host=on_host)
    steps = [
        wire.number(PLAN_VERSION, VERSION),
        *([wire.number(PROPAGATION, syscalls.MS_SLAVE | syscalls.MS_REC)] if own_mounts else []),
        wire.text(ROOTFS, rootfs, "root.path"),
        *files.steps(procfs if "pid" in joined else ""),
        *_early_hooks(spec.hooks, hook_state, net_requests),
        wire.number(PIVOT, _way_to_root(own_mounts, pivot)),
        *root_propagation(spec.linux.rootfs_propagation),
        *_console(process, bind=True),
        *files.readonly_steps(),
        *_names(spec, types),
        *sysctl.steps(SYSCTL, spec.linux.sysctl, types),
        *(wire.text(READONLY, path) for path in readonly_paths(spec) if path != "/"),
        *(wire.text(MASK, absolute(p, "linux.maskedPaths")) for p in dict.fromkeys(spec.linux.masked_paths)),
        *_process(
            process.but(exec_cpu_affinity=None),
            DEFAULT_UMASK,
            spec.linux,
            filter,
            spec.hooks.start_container,
        ),
    ]
    head = wire.bootstrap(
        create=_mask(types - set(joined)),
        paths=joined.items(),
        uid_map=spec.linux.uid_mappings if new_user else (),
        gid_map=spec.linux.gid_mappings if new_user else (),
        oom_score_adj=process.oom_score_adj,
        time_offsets=spec.linux.time_offsets,
        map_programs=map_programs,
        setgroups=setgroups,
        keyring=keyring,
    )
    return head + wire.message(wire.MESSAGE_PLAN, b"".join(steps), "the plan") + _strings(process)


def _way_to_root(own_mounts: bool, pivot: bool) -> int:
    if not own_mounts:
        return wire.PIVOT_CHROOT
    return wire.PIVOT_ROOT if pivot else wire.PIVOT_MOVE


def pause_messages(rootfs: str, join: Mapping[str, str]) -> bytes:
    """Encode the messages for the init of a pid namespace that containers share: in `rootfs`, as nobody.

    A process that can trace it can control it: so it has no access to the machine, and limits that keep it small.
    `join` maps namespace types to paths as for an init; it has its own, empty network namespace.
    """
    steps = [
        wire.number(PLAN_VERSION, VERSION),
        wire.number(PROPAGATION, syscalls.MS_SLAVE | syscalls.MS_REC),
        wire.text(ROOTFS, rootfs),
        wire.number(PIVOT, wire.PIVOT_ROOT),
        wire.truth(ROOT_READONLY, True),
        *_process(PAUSE, DEFAULT_UMASK),
    ]
    head = wire.bootstrap(create=_mask(("pid", "mount", "network", "cgroup")), paths=join.items())
    return head + wire.message(wire.MESSAGE_PLAN, b"".join(steps), "the plan") + _strings(PAUSE)


def messages_fit(spec: Spec) -> bool:
    """Return whether a process in the container's cgroup can receive all messages within the memory limit."""
    resources = spec.linux.resources
    return resources is None or not 0 < (resources.memory.limit or 0) < MESSAGES_MEMORY


def init_namespaces(spec: Spec, join: Mapping[str, str]) -> int:
    """Return the new namespaces in which an init can be cloned, as CLONE_NEW* flags.

    0: it needs stages outside of them and of its cgroup, to write id maps or time offsets, to enter a pid namespace
    last, or to receive messages that may exceed its memory limit.  Raises SpecError.
    """
    joined = joined_paths(spec.linux, join)
    types = {namespace.type for namespace in spec.linux.namespaces} | set(joined)
    if "pid" in joined or not types.isdisjoint(("user", "time")) or any(is_id_mapped(mount) for mount in spec.mounts):
        return 0
    if not messages_fit(spec):
        return 0
    return _mask(types - {"cgroup", *joined})


def exec_messages(
    process: Process, spec: Spec, join: Mapping[str, str], filter: bytes = b"", *, on_host: bool = False
) -> bytes:
    """Encode the messages for another process in a running container, in all of its namespaces.

    `filter` is the container's (seccomp_bpf.py).  `on_host` does not impose the init process's no_new_privs, as in
    runc.
    """
    own = spec.process
    if own is not None:
        process = process.but(
            capabilities=process.capabilities if process.capabilities is not None else own.capabilities,
            rlimits=process.rlimits or own.rlimits,
            no_new_privileges=process.no_new_privileges or (own.no_new_privileges and not on_host),
            oom_score_adj=process.oom_score_adj if process.oom_score_adj is not None else own.oom_score_adj,
            scheduler=process.scheduler if process.scheduler is not None else own.scheduler,
            io_priority=process.io_priority if process.io_priority is not None else own.io_priority,
            apparmor_profile=process.apparmor_profile or own.apparmor_profile,
            selinux_label=process.selinux_label or own.selinux_label,
        )
    types = {namespace.type for namespace in spec.linux.namespaces} | set(join)
    steps = [
        wire.number(PLAN_VERSION, VERSION),
        *_console(process, bind=False),
        *_process(process, None, spec.linux, filter),
    ]
    head = wire.bootstrap(join=_mask(types), oom_score_adj=process.oom_score_adj)
    return head + wire.message(wire.MESSAGE_PLAN, b"".join(steps), "the plan") + _strings(process)


def joined_paths(linux: Linux, join: Mapping[str, str]) -> dict[str, str]:
    """Return the namespaces entered by path: the configuration's, and `join` over them.  Raises SpecError."""
    paths = {namespace.type: namespace.path for namespace in linux.namespaces if namespace.path} | dict(join)
    for type_, path in paths.items():
        if type_ not in wire.NAMESPACES:
            raise SpecError("linux.namespaces", f"{type_!r} is not a namespace type")
        if not path.startswith("/") or "," in path or "\0" in path:
            raise SpecError("linux.namespaces", f"{path!r} must be an absolute path without a comma")
    return paths


def _mask(types: Iterable[str]) -> int:
    mask = 0
    for type_ in types:
        mask |= wire.NAMESPACES[type_][0]
    return mask


def _check_namespaces(spec: Spec, types: set[str], joined: Mapping[str, str], *, on_host: bool) -> None:
    """Reject what is impossible in the namespaces of an init process: `types`, of which some are `joined`."""
    linux = spec.linux
    if not on_host and ("mount" in joined or "mount" not in types):
        raise SpecError("linux.namespaces", "a container needs a new mount namespace")
    if "mount" not in types and (linux.masked_paths or linux.readonly_paths):
        raise SpecError("linux.namespaces", "unable to restrict sys entries without a private MNT namespace")
    if "pid" in joined and spec.hooks.create_container:
        # They would be created in it with the runtime's root, exposed to processes there that can trace them.
        raise SpecError("hooks.createContainer", "cannot run in a pid namespace with others in it")
    _check_maps(linux, "user" in types - set(joined), joined="user" in joined)
    if linux.net_devices and "network" not in types:
        raise SpecError("linux.netDevices", "unable to move network devices without a NET namespace")
    if linux.time_offsets and ("time" not in types or "time" in joined):
        raise SpecError("linux.timeOffsets", "need a new time namespace")


def _check_maps(linux: Linux, new_user: bool, *, joined: bool) -> None:
    """Check the id maps.  For a joined namespace they describe its existing maps: engines give both."""
    maps = {"linux.uidMappings": linux.uid_mappings, "linux.gidMappings": linux.gid_mappings}
    for name, mappings in maps.items():
        if mappings and not (new_user or joined):
            raise SpecError(name, "needs a new user namespace")
        if new_user and not mappings:
            raise SpecError(name, "is needed by a new user namespace")
        if len(mappings) > 340:
            raise SpecError(name, f"holds {len(mappings)} mappings, and the kernel accepts at most 340")


def _console(process: Process, *, bind: bool) -> Iterable[bytes]:
    if process.terminal:
        rows, columns = process.console_size or (0, 0)
        yield wire.attribute(CONSOLE, pack("=HHI", rows, columns, bind))


def _names(spec: Spec, types: set[str]) -> Iterable[bytes]:
    for field, value, step in (("hostname", spec.hostname, HOSTNAME), ("domainname", spec.domainname, DOMAINNAME)):
        if not value:
            continue
        if "uts" not in types:
            raise SpecError(field, "needs a uts namespace")
        if len(value.encode()) > 64:
            raise SpecError(field, "is longer than 64 bytes")
        yield wire.text(step, value)


def _early_hooks(hooks: Hooks, state: str, net_requests: Iterable[tuple[str, bytes]]) -> Iterable[bytes]:
    """Encode the hooks before pivot_root, the state for all hooks that nsexec runs, and the pause for the runtime's."""
    requests = list(net_requests)
    if hooks.create_container or hooks.start_container:
        yield wire.text(HOOK_STATE, state, "the state for hooks")
    if hooks.prestart or hooks.create_runtime or requests:
        yield wire.truth(RUNTIME_HOOKS, True)
    for interface, request in requests:
        yield wire.attribute(wire.NETLINK, wire.texts(interface) + request, "linux.netDevices")
    yield from (_hook(CREATE_HOOK, hook) for hook in hooks.create_container)


def _hook(step: int, hook: Hook) -> bytes:
    args = hook.args or (hook.path,)
    numbers = pack("=3I", hook.timeout or 0, len(args), len(hook.env))
    return wire.attribute(step, numbers + wire.texts(hook.path, *args, *hook.env), f"the hook {hook.path}")


def _process(
    process: Process,
    default_umask: int | None,
    linux: Linux = NO_LINUX,
    filter: bytes = b"",
    hooks: Iterable[Hook] = (),
) -> Iterable[bytes]:
    """Encode the steps that set up a process, the same for an init and an exec; `hooks` run right before its
    program.
    """
    user = process.user
    if len(user.additional_gids) > GROUPS_MAX:
        raise SpecError("process.user.additionalGids", f"must be at most {GROUPS_MAX}, not {len(user.additional_gids)}")
    umask = user.umask if user.umask is not None else default_umask
    if umask is not None:
        yield wire.number(UMASK, umask)
    for limit in process.rlimits:
        resource = rlimit_number(limit.type, "process.rlimits")
        yield wire.attribute(RLIMIT, pack("=IIQQ", resource, 0, limit.soft, limit.hard))
    cpus = process.exec_cpu_affinity
    if cpus is not None and cpus.initial is not None:
        yield wire.attribute(CPUS, cpus.initial)
    if cpus is not None and cpus.final is not None:
        yield wire.attribute(FINAL_CPUS, cpus.final)
    if process.scheduler is not None:
        yield wire.attribute(SCHEDULER, process.scheduler)
    if process.io_priority is not None:
        yield wire.number(IO_PRIORITY, process.io_priority)
    if linux.personality is not None:
        yield wire.number(PERSONALITY, linux.personality)
    if linux.memory_policy is not None:
        policy = linux.memory_policy
        yield wire.attribute(wire.MEMORY_POLICY, pack("=I", policy.mode) + policy.nodes, "linux.memoryPolicy")
    if process.apparmor_profile:
        yield wire.attribute(LABEL, wire.texts("apparmor/exec", f"exec {process.apparmor_profile}"))
    elif process.selinux_label:
        yield wire.attribute(LABEL, wire.texts("exec", process.selinux_label))
    if process.no_new_privileges:
        yield wire.truth(NO_NEW_PRIVS, True)
    if filter:
        yield wire.attribute(SECCOMP, filter, "linux.seccomp")
    for start in range(0, len(user.additional_gids), GROUPS_AT_ONCE):
        groups = user.additional_gids[start : start + GROUPS_AT_ONCE]
        yield wire.attribute(GROUPS, pack(f"={len(groups)}I", *groups))
    yield wire.attribute(USER, pack("=II", user.uid, user.gid))
    sets = process.capabilities or Capabilities()
    yield wire.attribute(
        CAPABILITIES,
        pack(
            "=5Q",
            *(
                capability_mask(getattr(sets, name), f"process.capabilities.{name}")
                for name in ("bounding", "effective", "permitted", "inheritable", "ambient")
            ),
        ),
    )
    yield wire.text(CWD, process.cwd, "process.cwd")
    yield from (_hook(START_HOOK, hook) for hook in hooks)
    yield wire.attribute(STRINGS, pack("=II", len(process.args), len(environment(process))))


def environment(process: Process) -> tuple[str, ...]:
    """Return the environment without duplicates (the last one wins) and with a HOME.  Raises SpecError."""
    variables: dict[str, str] = {}
    for variable in process.env:
        name, equals, value = variable.partition("=")
        if not equals or not name:
            raise SpecError("process.env", f"{variable!r} is not of the form NAME=value")
        variables[name] = value
    variables.setdefault("HOME", "/root" if process.user.uid == 0 else "/")
    return tuple(f"{name}={value}" for name, value in variables.items())


def _strings(process: Process) -> bytes:
    return wire.strings((*process.args, *environment(process)))
